// RMSNorm and LayerNorm on every instruction set of this build and machine, against float64.
//
// All dtypes, lengths that fill no vector, with and without weight and bias; rows apart from one
// another, beside pages that must not be touched; the same bits from any number of threads.
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

void no_rows() {
  const moefast_rows none = {nullptr, MOEFAST_FLOAT32, 0, 8, 8};
  EXPECT(moefast_norm(engine("", 1), &none, nullptr, nullptr, kEps, 0, nullptr, MOEFAST_FLOAT32) ==
         MOEFAST_OK);
}

}  // namespace
}  // namespace moefast::testing

int main(int count, char** arguments) {
  using namespace moefast::testing;
  const char* only = count > 1 ? arguments[1] : nullptr;
  run_case("no rows", no_rows, only);
  run_case("shapes", shapes, only);
  return verdict();
}
