// RMSNorm and LayerNorm on every instruction set of this build and machine, against float64.
//
// All dtypes, lengths that fill no vector, with and without weight and bias; rows apart from one
// another, beside pages that must not be touched; the same bits from any number of threads. Of
// sums: the same bits as from the sum, in the test's own arithmetic, and then the norm.
#include <cmath>
#include <vector>

#include "engines.h"
#include "guarded.h"
#include "weights.h"

namespace moefast::testing {
namespace {

constexpr float kEps = 1e-5f;

struct Case {
  int64_t count, dims, gap;  // rows are `gap` values apart
  int dtype, out_dtype;
  bool weighted, biased, centered;
};

// Random values that end beside a page that must not be touched.
class Values {
 public:
  Values(int dtype, int64_t count, uint64_t seed)
      : dtype_(dtype), memory_(static_cast<size_t>(count * size_of(dtype))) {
    Random random(seed);
    for (int64_t i = 0; i < count; ++i) {
      put(dtype, 3 * random.normal(), memory_.data() + i * size_of(dtype));
    }
  }
  const void* data() const { return memory_.data(); }
  double operator[](int64_t i) const {
    return value_of(dtype_, memory_.data() + i * size_of(dtype_));
  }

 private:
  int dtype_;
  Guarded memory_;
};

double expected(
    const Case& c, const double* x, int64_t i, const Values& weight, const Values& bias) {
  double mean = 0, square = 0;
  for (int64_t k = 0; c.centered && k < c.dims; ++k) {
    mean += x[k] / static_cast<double>(c.dims);
  }
  for (int64_t k = 0; k < c.dims; ++k) {
    square += (x[k] - mean) * (x[k] - mean) / static_cast<double>(c.dims);
  }
  const double normed = (x[i] - mean) / std::sqrt(square + static_cast<double>(kEps));
  return normed * (c.weighted ? weight[i] : 1) + (c.biased ? bias[i] : 0);
}

// Float32 sums of values of size 3, scaled with weights of that size, and the output's rounding.
double allowed(int dtype, double value) {
  const double rounding = dtype == MOEFAST_FLOAT32   ? 0x1p-23
                          : dtype == MOEFAST_FLOAT16 ? 0x1p-11
                                                     : 0x1p-8;
  return 2e-5 + rounding * 1.001 * std::fabs(value);
}

void check(const Case& c, uint64_t seed) {
  const int64_t stride = c.dims + c.gap;
  const Values x(c.dtype, c.count * stride - c.gap, seed);
  const Values weight(c.dtype, c.dims, seed + 1), bias(c.dtype, c.dims, seed + 2);
  const moefast_rows rows = {x.data(), c.dtype, c.count, c.dims, stride};
  const moefast_vector scaled = {c.weighted ? weight.data() : nullptr, c.dtype};
  const moefast_vector moved = {bias.data(), c.dtype};
  const size_t bytes = static_cast<size_t>(c.count * c.dims * size_of(c.out_dtype));
  for (const Isa* isa : isas()) {
    const auto run = [&](int threads, const Guarded& out) {
      EXPECT(moefast_norm(engine(isa->name, threads), &rows, &scaled, c.biased ? &moved : nullptr,
                          kEps, c.centered, out.data(), c.out_dtype) == MOEFAST_OK);
    };
    const Guarded first(bytes);
    run(1, first);
    double worst = 0;
    for (int64_t r = 0; r < c.count; ++r) {
      std::vector<double> row;
      for (int64_t i = 0; i < c.dims; ++i) {
        row.push_back(x[r * stride + i]);
      }
      for (int64_t i = 0; i < c.dims; i += 1 + c.dims / 50) {
        const double want = expected(c, row.data(), i, weight, bias);
        const double got =
            value_of(c.out_dtype, first.data() + (r * c.dims + i) * size_of(c.out_dtype));
        const double off = std::fabs(got - want) / allowed(c.out_dtype, want);
        worst = off <= worst ? worst : off;  // NaN counts
      }
    }
    if (!(worst <= 1)) {
      std::printf("  %s, %d rows of %d: %.3g of what is allowed\n", isa->name,
                  static_cast<int>(c.count), static_cast<int>(c.dims), worst);
    }
    EXPECT(worst <= 1);
    const Guarded again(bytes, Guarded::kBegin);
    run(3, again);
    EXPECT(std::memcmp(first.data(), again.data(), bytes) == 0);
  }
}

void shapes() {
  uint64_t seed = 0;
  for (int64_t dims : {1, 7, 15, 16, 17, 100, 2051}) {
    for (int64_t count : {1, 3, 40}) {
      for (int options = 0; options < 8; ++options, ++seed) {
        check({count, dims, static_cast<int64_t>(seed % 3), static_cast<int>(seed % 3),
               static_cast<int>(seed / 3 % 3), (options & 1) != 0, (options & 2) != 0,
               (options & 4) != 0},
              seed);
      }
    }
  }
  check({20000, 3, 1, MOEFAST_FLOAT32, MOEFAST_FLOAT32, true, false, false}, 1);  // many pieces
}

// What `value` is in a dtype: rounded to nearest, ties to even.
float rounded(int dtype, float value) {
  uint8_t bytes[4];
  isas().back()->narrow(dtype, &value, 1, bytes);
  return static_cast<float>(value_of(dtype, bytes));
}

struct SumCase {
  int64_t count, dims;
  int dtype, branch_dtype, sum_dtype, out_dtype;
  float multiplier;
  bool centered;
};

void check_sum(const SumCase& c, uint64_t seed) {
  const int64_t gap = static_cast<int64_t>(seed % 4), stride = c.dims + gap;
  const Values x(c.dtype, c.count * stride - gap, seed);
  const Values branch(c.branch_dtype, c.count * c.dims, seed + 1);
  const Values weight(c.dtype, c.dims, seed + 2), bias(c.dtype, c.dims, seed + 3);
  const moefast_rows rows = {x.data(), c.dtype, c.count, c.dims, stride};
  const moefast_rows added = {branch.data(), c.branch_dtype, c.count, c.dims, c.dims};
  const moefast_vector scaled = {weight.data(), c.dtype};
  const moefast_vector moved = {c.centered ? bias.data() : nullptr, c.dtype};
  const size_t sum_bytes = static_cast<size_t>(c.count * c.dims * size_of(c.sum_dtype));
  const size_t bytes = static_cast<size_t>(c.count * c.dims * size_of(c.out_dtype));

  // Rounded after every step; volatile, so that no compiler makes one step of two.
  Guarded want_sum(sum_bytes);
  const float factor = rounded(c.branch_dtype, c.multiplier);
  for (int64_t r = 0; r < c.count; ++r) {
    for (int64_t i = 0; i < c.dims; ++i) {
      volatile float product = factor * static_cast<float>(branch[r * c.dims + i]);
      product = rounded(c.branch_dtype, product);
      volatile float sum = static_cast<float>(x[r * stride + i]) + product;
      const float exact = sum;
      isas().back()->narrow(c.sum_dtype, &exact, 1,
                            want_sum.data() + (r * c.dims + i) * size_of(c.sum_dtype));
    }
  }
  const moefast_rows sums = {want_sum.data(), c.sum_dtype, c.count, c.dims, c.dims};
  for (const Isa* isa : isas()) {
    for (int threads : {1, 3}) {
      auto* on = engine(isa->name, threads);
      const Guarded sum(sum_bytes), out(bytes, Guarded::kBegin), want(bytes);
      EXPECT(moefast_norm(on, &sums, &scaled, &moved, kEps, c.centered, want.data(), c.out_dtype) ==
             MOEFAST_OK);
      EXPECT(moefast_add_norm(on, &rows, &added, c.multiplier, &scaled, &moved, kEps, c.centered,
                              sum.data(), c.sum_dtype, out.data(), c.out_dtype) == MOEFAST_OK);
      EXPECT(std::memcmp(sum.data(), want_sum.data(), sum_bytes) == 0);
      EXPECT(std::memcmp(out.data(), want.data(), bytes) == 0);
    }
  }
}

void sums() {
  uint64_t seed = 0;
  for (int64_t dims : {1, 7, 16, 17, 100, 2051}) {
    for (int64_t count : {1, 3, 40}) {
      for (float multiplier : {1.0f, 0.22f, -3.1f}) {
        for (int mixed = 0; mixed < 4; ++mixed, ++seed) {
          const int dtype = static_cast<int>(seed / 3 % 3);
          const int branch = mixed == 0 ? (dtype + 1) % 3 : dtype;
          const int sum = branch == dtype ? dtype : MOEFAST_FLOAT32;
          check_sum({count, dims, dtype, branch, sum, mixed == 1 ? MOEFAST_FLOAT32 : sum,
                     multiplier, seed % 2 == 0},
                    seed);
        }
      }
    }
  }
  check_sum({20000, 3, MOEFAST_BFLOAT16, MOEFAST_BFLOAT16, MOEFAST_BFLOAT16, MOEFAST_BFLOAT16,
             0.22f, false},
            1);  // many pieces
}

void refusals() {
  const float values[8] = {};
  float sum[8], out[8];
  const moefast_rows x = {values, MOEFAST_FLOAT32, 2, 4, 4};
  for (const moefast_rows& branch :
       {moefast_rows{values, MOEFAST_FLOAT32, 1, 4, 4},
        moefast_rows{values, MOEFAST_FLOAT32, 2, 3, 3}, moefast_rows{values, 7, 2, 4, 4}}) {
    EXPECT(moefast_add_norm(engine("", 1), &x, &branch, 1, nullptr, nullptr, kEps, 0, sum,
                            MOEFAST_FLOAT32, out, MOEFAST_FLOAT32) == MOEFAST_BAD_VALUE);
  }
  EXPECT(moefast_add_norm(engine("", 1), &x, &x, 1, nullptr, nullptr, kEps, 0, nullptr,
                          MOEFAST_FLOAT32, out, MOEFAST_FLOAT32) == MOEFAST_BAD_VALUE);
}

void no_rows() {
  const moefast_rows none = {nullptr, MOEFAST_FLOAT32, 0, 8, 8};
  EXPECT(moefast_norm(engine("", 1), &none, nullptr, nullptr, kEps, 0, nullptr, MOEFAST_FLOAT32) ==
         MOEFAST_OK);
  EXPECT(moefast_add_norm(engine("", 1), &none, &none, 1, nullptr, nullptr, kEps, 0, nullptr,
                          MOEFAST_FLOAT32, nullptr, MOEFAST_FLOAT32) == MOEFAST_OK);
}

}  // namespace
}  // namespace moefast::testing

int main(int count, char** arguments) {
  using namespace moefast::testing;
  const char* only = count > 1 ? arguments[1] : nullptr;
  run_case("no rows", no_rows, only);
  run_case("shapes", shapes, only);
  run_case("sums", sums, only);
  run_case("refusals", refusals, only);
  return verdict();
}
