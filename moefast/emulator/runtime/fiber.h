// One GPU thread: a stack of its own, in whose lowest page lies this record, with a page nobody
// may touch in between. Code that runs on the stack finds the record from the stack pointer, with
// no thread-local storage.
#pragma once
#include "abi.h"

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;

enum class State : uint32_t { kRunnable, kAtSimd, kAtBarrier, kReturned };

struct Worker;

struct Fiber {
  void* stack;
  Worker* worker;
  Context context;
  State state;
  uint32_t thread;
  uint32_t operation;  // at a simd operation: which; at a simdgroup barrier: kBarrierOperation
  uint32_t flags;      // at a barrier: MemoryFlags
  uint32_t site;
  uint32_t bytes;
  uint32_t slot;          // which of the two exchanges holds what this lane brought
  uintptr_t pc;           // where it waits
  uint64_t round;         // of the loops around it; check mode only
  uint64_t coming_round;  // of what it comes to next
  uintptr_t caller;  // where the kernel called what waits for it, if that is not the kernel itself
};

constexpr uint32_t kBarrierOperation = 100;

// Stacks lie a power of two apart. Were all records at their start and all frames at their end, the
// lanes of a simdgroup would share a few sets of the cache, and push each other out of it.
constexpr uintptr_t kColours = 32, kRecordStep = 64, kFrameStep = 128;
inline uintptr_t colour(uintptr_t stack) {
  return stack / kStackBytes % kColours;
}
inline Fiber* fiber_of(uintptr_t stack) {
  return (Fiber*)(stack + colour(stack) * kRecordStep);
}
inline uint8_t* top_of(uintptr_t stack) {
  return (uint8_t*)(stack + kStackBytes - colour(stack) * kFrameStep);
}

inline Fiber* current_fiber() {
  return fiber_of((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(kStackBytes - 1));
}

}  // namespace emulator
