// Where tiles lie within pages of 4 KB.
//
// A load whose address equals that of an earlier store in the low 12 bits waits for the store,
// although they have nothing to do with each other: the processor compares these bits first.
// Weights are dequantised while the weights before them are multiplied, so stores of one block run
// beside loads of another, and would bring the tile unit to a halt. Therefore even blocks use the
// lower half of each page only, odd blocks the upper half, in weights and activations alike: two
// pages hold four tiles of two blocks.
#ifndef MOEFAST_CPU_AMX_PAGES_H
#define MOEFAST_CPU_AMX_PAGES_H

#include <stdint.h>

namespace moefast {
namespace {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kPage = kPageBytes / 2;  // in bfloat16 values
constexpr int64_t kHalfPage = kPage / 2;

// Where tile t of a block's four begins, from the block's first: two to a page.
static inline int64_t tile_in_block(int t) {
  return (t / 2) * kPage + (t % 2) * (kHalfPage / 2);
}

static inline uint16_t* page_from(const void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return reinterpret_cast<uint16_t*>((address + kPageBytes - 1) / kPageBytes * kPageBytes);
}

}  // namespace
}  // namespace moefast

#endif
