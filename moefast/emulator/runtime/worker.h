// What runs threadgroups one after another: the fibers of a threadgroup, its memory, its schedule.
#pragma once
#include "fiber.h"

namespace emulator {

struct ThreadgroupVariable {
  uint32_t id, offset, bytes;
};

// What check mode wants to hear; in run mode there is no listener.
struct Listener {
  virtual void threadgroup_starts(Worker&) = 0;
  virtual void barrier_passed(Worker&, uint32_t flags) = 0;
  virtual void simd_barrier_passed(Worker&, uint32_t simdgroup, uint32_t flags) = 0;
  // `mask` of the `live` lanes take part in the operation of `first`; `whole` is the mask of all
  // there are.
  virtual void simd_diverges(
      Worker&, Fiber& first, Fiber* other, uint32_t mask, uint32_t live, uint32_t whole) = 0;
  // `other` waits elsewhere, or null: `returned` threads have left the kernel.
  virtual void barrier_diverges(Worker&, Fiber& waits, Fiber* other, uint32_t returned) = 0;
  virtual void too_much_threadgroup_memory(Worker&, uint32_t bytes, uint32_t site) = 0;
  // Where a new variable lies; fills `offset`.
  virtual void place_variable(Worker&, ThreadgroupVariable&) = 0;

 protected:
  ~Listener() = default;
};

constexpr uint32_t kMostVariables = 64;
constexpr size_t kThreadgroupMapping = 16 << 20;

struct Random {
  uint64_t state;
  uint32_t below(uint32_t n);
};

struct Worker {
  const Launch* launch;
  Listener* listener;
  uint8_t* stacks;
  uint8_t* memory;  // threadgroup memory
  void* scheduler;  // its stack pointer while a fiber runs
  Fiber* running;
  uint32_t threads;  // of the current threadgroup
  uint32_t group[3];
  uint32_t phase[kLanes];  // per simdgroup: which exchange is filled next
  uint32_t variable_count, variable_bytes, top;
  uint32_t guarded;  // stacks that have their guard page
  uint32_t argument_offset[kBuffers];
  Random random;
  Counts counts;
  Outcome* outcome;  // where a failure is told
  ThreadgroupVariable variables[kMostVariables];
  Exchange exchange[kLanes][2];
  void* arguments[kArguments];
};

Worker* make_worker();  // null if there is no memory
void release_worker(Worker*);
// Before the first threadgroup of a launch.
void begin_launch(Worker&, const Launch&, Listener*, Outcome*);
// Runs one threadgroup; false if the launch cannot go on (outcome says why).
bool run_threadgroup(Worker&, uint32_t x, uint32_t y, uint32_t z);
inline Fiber& fiber(Worker& worker, uint32_t thread) {
  return *fiber_of((uintptr_t)worker.stacks + thread * kStackBytes);
}
// Writes down a fault of the running fiber; called from a signal handler.
void tell_fault(const Worker&, int signal, void* address, Outcome&);
// Leaves the running fiber for good.
[[noreturn]] void abandon(Worker&);

}  // namespace emulator
