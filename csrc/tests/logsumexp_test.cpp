// logsumexp on every instruction set of this build and machine, against float64.
//
// All dtypes, lengths that fill no vector and lengths of several pieces, rows apart from one
// another, beside pages that must not be touched; values of all magnitudes, infinite ones and NaN;
// the same bits from any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "engines.h"
#include "guarded.h"
#include "weights.h"

namespace moefast::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Rows of `dims` values, `gap` values apart, that end beside a page that must not be touched.
struct Rows {
  Rows(int dtype, int64_t count, int64_t dims, int64_t gap)
      : of{nullptr, dtype, count, dims, dims + gap},
        memory(static_cast<size_t>((count * (dims + gap) - gap) * size_of(dtype))) {
    of.data = memory.data();
  }
  void set(int64_t row, int64_t i, double value) { put(of.dtype, value, address(row, i)); }
  double get(int64_t row, int64_t i) const { return value_of(of.dtype, address(row, i)); }

  moefast_rows of;
  Guarded memory;

 private:
  uint8_t* address(int64_t row, int64_t i) const {
    return memory.data() + (row * of.stride + i) * size_of(of.dtype);
  }
};

double expected(const Rows& x, int64_t row) {
  double largest = -kInfinity, sum = 0;
  for (int64_t i = 0; i < x.of.dims; ++i) {
    if (std::isnan(x.get(row, i))) {
      return x.get(row, i);
    }
    largest = std::max(largest, x.get(row, i));
  }
  if (std::isinf(largest)) {
    return largest;
  }
  for (int64_t i = 0; i < x.of.dims; ++i) {
    sum += std::exp(x.get(row, i) - largest);
  }
  return largest + std::log(sum);
}

// The output's rounding, and exponentials within 2 ulp in sums of float32.
double allowed(int dtype, double value) {
  const double rounding = dtype == MOEFAST_FLOAT32   ? 0x1p-23
                          : dtype == MOEFAST_FLOAT16 ? 0x1p-11
                                                     : 0x1p-8;
  return 2e-6 + rounding * 1.001 * std::fabs(value);
}

void check(const Rows& x, int out_dtype) {
  const size_t bytes = static_cast<size_t>(x.of.count * size_of(out_dtype));
  for (const Isa* isa : isas()) {
    const auto run = [&](int threads, const Guarded& out) {
      EXPECT(moefast_logsumexp(engine(isa->name, threads), &x.of, out.data(), out_dtype) ==
             MOEFAST_OK);
    };
    const Guarded first(bytes), again(bytes, Guarded::kBegin);
    run(1, first);
    for (int64_t r = 0; r < x.of.count; ++r) {
      const double want = expected(x, r);
      const double got = value_of(out_dtype, first.data() + r * size_of(out_dtype));
      const bool right = std::isnan(want)   ? std::isnan(got)
                         : std::isinf(want) ? got == want
                                            : std::fabs(got - want) <= allowed(out_dtype, want);
      if (!right) {
        std::printf("  %s, %d values, row %d: %.9g instead of %.9g\n", isa->name,
                    static_cast<int>(x.of.dims), static_cast<int>(r), got, want);
      }
      EXPECT(right);
    }
    run(3, again);
    EXPECT(std::memcmp(first.data(), again.data(), bytes) == 0);
  }
}

void shapes() {
  uint64_t seed = 0;
  for (int64_t dims : {1, 7, 8, 31, 32, 33, 4095, 4096, 4097, 20011}) {
    for (int64_t count : {1, 3, 9}) {
      for (double size : {1e-3, 3.0, 60.0}) {
        Random random(++seed);
        const int dtype = static_cast<int>(seed % 3);
        Rows x(dtype, count, dims, static_cast<int64_t>(seed % 4));
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t i = 0; i < dims; ++i) {
            x.set(r, i, size * random.normal());
          }
        }
        check(x, dtype);
      }
    }
  }
}

// One value, or two, that decide alone, in the first piece, at the end of one and in the last.
void unusual_values() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t dims : {5, 4100, 9000}) {
    for (int64_t at : {int64_t{0}, std::min<int64_t>(4095, dims - 1), dims - 1}) {
      for (double rest : {0.0, -kInfinity, -3e38, 3e38, 1e-40}) {
        for (double value : {kInfinity, -kInfinity, nan, 3.2e38, -3.2e38, 88.0, -200.0, 1e-42}) {
          for (double other : {rest, nan, kInfinity}) {
            Rows x(MOEFAST_FLOAT32, 2, dims, 1);
            for (int64_t r = 0; r < 2; ++r) {
              for (int64_t i = 0; i < dims; ++i) {
                x.set(r, i, rest);
              }
            }
            x.set(0, at, value);
            x.set(1, at, value);
            x.set(1, dims / 2, other);
            check(x, MOEFAST_FLOAT32);
          }
        }
      }
    }
  }
}

void no_rows_and_refusals() {
  const float values[8] = {};
  float out[2];
  const moefast_rows none = {nullptr, MOEFAST_FLOAT32, 0, 8, 8};
  EXPECT(moefast_logsumexp(engine("", 1), &none, nullptr, MOEFAST_FLOAT32) == MOEFAST_OK);
  const moefast_rows x = {values, MOEFAST_FLOAT32, 2, 4, 4};
  EXPECT(moefast_logsumexp(engine("", 1), &x, nullptr, MOEFAST_FLOAT32) == MOEFAST_BAD_VALUE);
  EXPECT(moefast_logsumexp(engine("", 1), nullptr, out, MOEFAST_FLOAT32) == MOEFAST_BAD_VALUE);
  EXPECT(moefast_logsumexp(engine("", 1), &x, out, 3) == MOEFAST_BAD_VALUE);
  const moefast_rows empty = {values, MOEFAST_FLOAT32, 2, 0, 4};
  EXPECT(moefast_logsumexp(engine("", 1), &empty, out, MOEFAST_FLOAT32) == MOEFAST_BAD_VALUE);
}

}  // namespace
}  // namespace moefast::testing

int main(int count, char** arguments) {
  using namespace moefast::testing;
  const char* only = count > 1 ? arguments[1] : nullptr;
  run_case("shapes", shapes, only);
  run_case("unusual values", unusual_values, only);
  run_case("no rows and refusals", no_rows_and_refusals, only);
  return verdict();
}
