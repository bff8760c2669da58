// A simdgroup runs until each of its lanes waits or has returned. Lanes that wait at a simd
// operation go on together: those at the lowest program counter first, which brings lanes that left
// a loop early back together with the others. When all simdgroups wait at a barrier, or have
// returned, it opens.
#include "schedule.h"

#include <string.h>

#include "context_switch.h"

namespace emulator {

void resume(Worker& worker, Fiber& f) {
  worker.running = &f;
  msl_switch(&worker.scheduler, f.stack);
  worker.running = nullptr;
}

static void wait(Fiber& me, State state) {
  me.state = state;
  msl_switch(&me.stack, me.worker->scheduler);
}

static void release(Worker& worker, uint32_t simdgroup, uint32_t mask, const Fiber& first) {
  if (first.operation == kBarrierOperation) {
    worker.counts.simd_barriers++;
    if (worker.listener)
      worker.listener->simd_barrier_passed(worker, simdgroup, first.flags);
  } else if (first.operation == kMatrixMultiply) {
    worker.counts.multiplies++;
  } else {
    worker.counts.simd_operations++;
  }
  uint32_t slot = worker.phase[simdgroup] & 1;
  Exchange& exchange = worker.exchange[simdgroup][slot];
  exchange.mask = mask;
  exchange.done = 0;
  for (uint32_t lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1))
      continue;
    Fiber& f = fiber(worker, simdgroup * kLanes + lane);
    // A lane that has waited longer than others brought its value to the other exchange.
    if (f.slot != slot && f.operation != kBarrierOperation)
      memcpy(exchange.lane[lane], worker.exchange[simdgroup][f.slot].lane[lane], f.bytes);
    f.state = State::kRunnable;
    f.slot = slot;
  }
  worker.phase[simdgroup]++;
}

// Divergence of a quad operation counts within each quad only.
static bool complete(const Fiber& first, uint32_t mask, uint32_t live) {
  if (first.operation != kQuad)
    return mask == live;
  for (uint32_t quad = 0; quad < kLanes; quad += 4) {
    uint32_t part = mask >> quad & 15;
    if (part && part != (live >> quad & 15))
      return false;
  }
  return true;
}

static void run_simdgroup(Worker& worker, uint32_t simdgroup) {
  uint32_t from = simdgroup * kLanes;
  uint32_t lanes = worker.threads - from < kLanes ? worker.threads - from : kLanes;
  for (;;) {
    for (uint32_t lane = 0; lane < lanes; lane++) {
      Fiber& f = fiber(worker, from + lane);
      if (f.state == State::kRunnable)
        resume(worker, f);
      if (worker.outcome->status != kFinished)
        return;
    }
    Fiber *first = nullptr, *other = nullptr;
    uint32_t live = 0, alike = 0;
    for (uint32_t lane = 0; lane < lanes; lane++) {
      Fiber& f = fiber(worker, from + lane);
      if (f.state == State::kReturned)
        continue;
      live |= 1u << lane;
      if (f.state == State::kAtSimd && (!first || f.pc < first->pc))
        first = &f, alike = 0;
      if (f.state == State::kAtSimd && f.pc == first->pc && f.operation == first->operation &&
          f.round == first->round)
        alike |= 1u << lane;
    }
    if (!first)
      return;
    uint32_t mask = alike, together = alike;
    // Mostly all are at the same place.
    for (uint32_t lane = 0; lane < lanes && alike != live; lane++) {
      Fiber& f = fiber(worker, from + lane);
      bool here = f.state == State::kAtSimd && f.pc == first->pc && f.operation == first->operation;
      if (here)
        mask |= 1u << lane;
      if (here && f.round == first->round)
        together |= 1u << lane;
      else if (f.state != State::kReturned)
        other = &f;
    }
    if (worker.listener) {
      // Simdgroup barriers are for the lanes there are, those that have returned included; values
      // need all 32.
      uint32_t there = lanes < kLanes ? (1u << lanes) - 1 : ~0u;
      uint32_t whole = first->operation == kBarrierOperation ? there : ~0u;
      if (!complete(*first, together, live) || !complete(*first, together, whole))
        worker.listener->simd_diverges(worker, *first,
                                       complete(*first, together, live) ? nullptr : other, together,
                                       live, whole);
    }
    release(worker, simdgroup, mask, *first);
  }
}

// All that have not returned wait at a barrier; false if all have returned.
static bool open_barrier(Worker& worker) {
  Fiber *first = nullptr, *other = nullptr;
  uint32_t returned = 0, flags = ~0u;
  for (uint32_t i = 0; i < worker.threads; i++) {
    Fiber& f = fiber(worker, i);
    if (f.state == State::kReturned) {
      returned++;
      continue;
    }
    if (!first)
      first = &f;
    else if ((f.pc != first->pc || f.round != first->round) && !other)
      other = &f;
    flags &= f.flags;
    f.state = State::kRunnable;
  }
  if (!first)
    return false;
  worker.counts.barriers++;
  if (worker.listener) {
    if (other || returned)
      worker.listener->barrier_diverges(worker, *first, other, returned);
    worker.listener->barrier_passed(worker, flags);
  }
  return true;
}

bool schedule(Worker& worker) {
  uint32_t simdgroups = (worker.threads + kLanes - 1) / kLanes;
  uint8_t order[kLanes];
  for (uint32_t i = 0; i < simdgroups; i++)
    order[i] = (uint8_t)i;
  do {
    if (worker.launch->shuffle)
      for (uint32_t i = simdgroups; i > 1; i--) {
        uint32_t j = worker.random.below(i);
        uint8_t swapped = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swapped;
      }
    for (uint32_t i = 0; i < simdgroups; i++) {
      run_simdgroup(worker, order[i]);
      if (worker.outcome->status != kFinished)
        return false;
    }
  } while (open_barrier(worker));
  return true;
}

uint32_t threadgroup_variable(
    Worker& worker, uint32_t id, uint32_t bytes, uint32_t alignment, uint32_t site) {
  for (uint32_t i = 0; i < worker.variable_count; i++)
    if (worker.variables[i].id == id)
      return worker.variables[i].offset;
  if (alignment < 16)
    alignment = 16;
  worker.variable_bytes += (bytes + 15) & ~15u;
  bool fits =
      worker.variable_count < kMostVariables && worker.variable_bytes <= kMostThreadgroupBytes;
  if (!fits && worker.listener)
    worker.listener->too_much_threadgroup_memory(worker, worker.variable_bytes, site);
  if (worker.variable_count == kMostVariables || bytes > kThreadgroupMapping / 4 ||
      (!fits && !worker.listener)) {
    worker.outcome->detail = worker.variable_bytes;
    worker.outcome->status = kThreadgroupBytes;
    // Before the first threadgroup there is no fiber to leave; the launch ends before it starts.
    if (worker.running)
      abandon(worker);
    return 0;
  }
  ThreadgroupVariable& v = worker.variables[worker.variable_count++];
  v = {id, (worker.top + alignment - 1) & ~(alignment - 1), bytes};
  if (worker.listener)
    worker.listener->place_variable(worker, v);
  worker.top = v.offset + bytes;
  return v.offset;
}

}  // namespace emulator

using namespace emulator;

// The place in the kernel from which a thread came to wait.
static void waits_at(Fiber& me, void* returns_to) {
  me.pc = me.caller ? me.caller : (uintptr_t)returns_to;
  me.round = me.coming_round;
  me.caller = me.coming_round = 0;
}

MSL_EXPORT void msl_call_from(uintptr_t address) {
  current_fiber()->caller = address;
}

MSL_EXPORT uint32_t msl_lane() {
  return current_fiber()->thread % kLanes;
}

MSL_EXPORT Exchange* msl_simd_exchange(const void* value,
                                       uint32_t bytes,
                                       uint32_t operation,
                                       uint32_t site) {
  Fiber& me = *current_fiber();
  Worker& worker = *me.worker;
  uint32_t simdgroup = me.thread / kLanes;
  me.slot = worker.phase[simdgroup] & 1;
  memcpy(worker.exchange[simdgroup][me.slot].lane[me.thread % kLanes], value, bytes);
  me.bytes = bytes;
  me.operation = operation;
  me.site = site;
  waits_at(me, __builtin_return_address(0));
  wait(me, State::kAtSimd);
  return &worker.exchange[simdgroup][me.slot];
}

MSL_EXPORT void msl_simd_barrier(uint32_t flags, uint32_t site) {
  Fiber& me = *current_fiber();
  me.operation = kBarrierOperation;
  me.flags = flags;
  me.site = site;
  waits_at(me, __builtin_return_address(0));
  wait(me, State::kAtSimd);
}

MSL_EXPORT void msl_threadgroup_barrier(uint32_t flags, uint32_t site) {
  Fiber& me = *current_fiber();
  me.flags = flags;
  me.site = site;
  waits_at(me, __builtin_return_address(0));
  wait(me, State::kAtBarrier);
}

MSL_EXPORT void* msl_threadgroup_variable(uint32_t id,
                                          uint32_t bytes,
                                          uint32_t alignment,
                                          uint32_t site) {
  Worker& worker = *current_fiber()->worker;
  return worker.memory + threadgroup_variable(worker, id, bytes, alignment, site);
}
