// Products of whole numbers: nothing is rounded, so every instruction set gives the truth itself.
//
// Activations are kept as 15-bit numbers, and sums of their products with codes are exact: here the
// steps, scales and offsets are powers of two or whole, and every sum is below 2^24 of its last
// place, so that float32 adds it up exactly in whatever order. A wrong bit anywhere is a
// difference: a product that misses the low half of an activation may stay within product_test's
// tolerance, but not within none.
#include <cstdio>

#include "expect.h"
#include "isas.h"
#include "rows.h"

namespace moefast::testing {
namespace {

// One of 64 values is 127 or -127, which makes the step of all of them 1/128; the others are small
// multiples of it, in bfloat16 too.
double activation(Random& random, int64_t i) {
  if (i % 64 == 0) {
    return random.below(2) ? 127 : -127;
  }
  return (random.below(201) - 100) / 128.0;
}

// A length at which no sum can reach 2^24: with codes up to 255 two blocks of 64 values.
int64_t length(const Format& format) {
  return format.mode == MOEFAST_AFFINE && format.bits == 8 ? 128 : 640;
}

void check(const Isa& isa, const Format& format, Precision precision, int dtype, int64_t count) {
  const int64_t in = length(format), out = 19;
  const uint64_t seed = static_cast<uint64_t>(count + dtype);
  const Product& product = *find_product(isa, format, precision, in, count);
  const Weight weight(format, out, in, Guarded::kEnd, seed, Weight::kWhole);
  Random random(seed);
  const Rows rows(product, format, dtype, count, in,
                  [&](int64_t i) { return activation(random, i); });
  EXPECT(rows.usable());
  Result result(count, out);
  rows.multiply(weight.matrix(), 0, out, 0, count, result.data(), result.stride());
  int64_t wrong = 0;
  for (int64_t n = 0; n < out; ++n) {
    for (int64_t r = 0; r < count; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < in; ++i) {
        sum += weight.value(n, i) * rows.value(r, i);
      }
      wrong += result.at(r, n) != sum;
    }
  }
  if (wrong != 0) {
    std::printf("  %s %s, %s, %s, %d rows: %d of %d are wrong\n", isa.name, product.name,
                name_of(format).c_str(), name_of(dtype), static_cast<int>(count),
                static_cast<int>(wrong), static_cast<int>(count * out));
  }
  EXPECT(wrong == 0);
}

}  // namespace
}  // namespace moefast::testing

int main() {
  using namespace moefast;
  using namespace moefast::testing;
  for (const Isa* isa : isas()) {
    for (const Format& format : all_formats()) {
      for (int64_t count : {1, 2, 3, 4, 9}) {
        check(*isa, format, kFloat32, MOEFAST_FLOAT32, count);
        check(*isa, format, kFloat16, MOEFAST_FLOAT16, count);
        check(*isa, format, kBfloat16, MOEFAST_BFLOAT16, count);
      }
    }
    std::printf("%s\n", isa->name);
  }
  return verdict();
}
