// What moefast_measure_read and moefast_measure_flops time.
#ifndef MOEFAST_CPU_GENERIC_MEASURE_H
#define MOEFAST_CPU_GENERIC_MEASURE_H

#include "prefetch.h"
#include "vector.h"

namespace moefast {
namespace {

// Reads `bytes` at `from` once and returns a sum, so that no read can be left out.
inline uint64_t read_once(const void* from, size_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(from);
  uint64_t sums[32] = {};
  size_t i = 0;
  for (; i + sizeof sums <= bytes; i += sizeof sums) {
    for (size_t line = 0; line < sizeof sums; line += kLineBytes) {
      __builtin_prefetch(at + i + kAheadBytes + line);
    }
    for (int k = 0; k < 32; ++k) {
      sums[k] += load64(at + i + 8 * k);
    }
  }
  uint64_t sum = 0;
  for (int k = 0; k < 32; ++k) {
    sum += sums[k];
  }
  for (; i < bytes; ++i) {
    sum += at[i];
  }
  return sum;
}

// Does `rounds` of independent multiply-adds, as many as hide each other's latency, and returns the
// number of floating point operations.
inline double count_flops(int64_t rounds) {
  constexpr int kChains = 10;
  Floats chains[kChains];
  for (int k = 0; k < kChains; ++k) {
    chains[k] = Floats{} + static_cast<float>(k);
  }
  const Floats factor = Floats{} + 0.5f;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int k = 0; k < kChains; ++k) {
      chains[k] = chains[k] * factor + factor;
    }
  }
  Floats sum = chains[0];
  for (int k = 1; k < kChains; ++k) {
    sum += chains[k];
  }
  // Whatever the sum is, the compiler must believe that it matters.
  asm volatile("" : : "m"(sum));
  return 2.0 * kChains * kFloats * static_cast<double>(rounds);
}

}  // namespace
}  // namespace moefast

#endif
