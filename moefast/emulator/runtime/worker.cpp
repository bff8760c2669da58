#include "worker.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "context_switch.h"
#include "schedule.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace emulator {

uint32_t Random::below(uint32_t n) {
  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (uint32_t)(((z ^ (z >> 31)) >> 32) * n >> 32);
}

static void* map(size_t bytes) {
  void* p =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

Worker* make_worker() {
  auto* worker = (Worker*)map(sizeof(Worker));
  if (!worker)
    return nullptr;
  // One more than needed, to align them: a fiber is found by masking the stack pointer.
  auto stacks = (uintptr_t)map((kMostThreads + 1) * kStackBytes);
  worker->memory = (uint8_t*)map(kThreadgroupMapping);
  if (!stacks || !worker->memory)
    return nullptr;
  worker->stacks = (uint8_t*)((stacks + kStackBytes - 1) & ~(uintptr_t)(kStackBytes - 1));
  return worker;
}

// Workers are few and kept for the next launch.
static Worker* idle[256];
static uint32_t idle_count;
static char idle_lock;

static void lock() {
  while (__atomic_test_and_set(&idle_lock, __ATOMIC_ACQUIRE)) {
  }
}

Worker* take_worker() {
  lock();
  Worker* worker = idle_count ? idle[--idle_count] : nullptr;
  __atomic_clear(&idle_lock, __ATOMIC_RELEASE);
  return worker ? worker : make_worker();
}

void release_worker(Worker* worker) {
  lock();
  if (idle_count < sizeof idle / sizeof *idle)
    idle[idle_count++] = worker;
  __atomic_clear(&idle_lock, __ATOMIC_RELEASE);
}

// With pages too large for it there is no guard.
static uintptr_t guard_bytes() {
  auto page = (uintptr_t)sysconf(_SC_PAGESIZE);
  return 4 * page <= kStackBytes && sizeof(Fiber) + kColours * kRecordStep <= page ? page : 0;
}

// Stacks are guarded when they are first used: each guard is a mapping more, of which a process may
// have a limited number. Where that is reached, the rest go without.
static void guard_stacks(Worker& worker, uint32_t wanted) {
  if (worker.guarded >= wanted)
    return;
  uintptr_t page = guard_bytes();
  for (; worker.guarded < wanted; worker.guarded++)
    if (page)
      mprotect(worker.stacks + worker.guarded * kStackBytes + page, page, PROT_NONE);
}

void tell_fault(const Worker& worker, int signal, void* address, Outcome& outcome) {
  uintptr_t page = guard_bytes(), at = (uintptr_t)address - (uintptr_t)worker.stacks;
  bool memory = signal == SIGSEGV || signal == SIGBUS;
  bool stack = memory && at < kMostThreads * kStackBytes && at % kStackBytes - page < page;
  outcome.status = stack ? kStack : kFault;
  outcome.detail = stack ? kStackBytes - 2 * page : (uint64_t)signal;
  outcome.address = (uint64_t)address;
  outcome.thread = worker.running->thread;
  memcpy(outcome.group, worker.group, sizeof outcome.group);
}

void abandon(Worker& worker) {
  void* nowhere;
  msl_switch(&nowhere, worker.scheduler);
  __builtin_trap();
}

// Of this OS thread, which runs kernels only. half has a bit of its own on arm64, and is converted
// without regard to it on x86-64: its denormals stay.
static void flush_denormals(bool flush) {
#if defined(__x86_64__)
  constexpr uint32_t kBits = 0x8000 | 0x40;  // FTZ, DAZ
  uint32_t control;
  asm volatile("stmxcsr %0" : "=m"(control));
  control = flush ? control | kBits : control & ~kBits;
  asm volatile("ldmxcsr %0" : : "m"(control));
#else
  constexpr uint64_t kBit = 1 << 24;  // FZ
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  control = flush ? control | kBit : control & ~kBit;
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

void begin_launch(Worker& worker, const Launch& launch, Listener* listener, Outcome* outcome) {
  flush_denormals(launch.flush);
  worker.launch = &launch;
  worker.listener = listener;
  worker.outcome = outcome;
  worker.variable_count = worker.variable_bytes = worker.top = 0;
  worker.counts = {};
  worker.random.state = launch.seed;
  memcpy(worker.arguments, (void*)launch.arguments, sizeof worker.arguments);
  for (uint32_t i = 0; i < kBuffers; i++) {
    uint32_t bytes = launch.threadgroup_bytes[i];
    if (!bytes)
      continue;
    uint32_t offset = threadgroup_variable(worker, kMostVariables + i, bytes, 16, 0);
    worker.arguments[kBuffers + i] = worker.memory + offset;
  }
}

static void set(Vector& v, uint32_t x, uint32_t y, uint32_t z) {
  v = {x, y, z, 0};
}

// What all threads of a threadgroup have in common.
static void fill_common(const Worker& worker, const uint32_t* size, Context& c) {
  const Launch& launch = *worker.launch;
  const uint32_t *grid = launch.grid, *full = launch.threadgroup;
  uint32_t whole = full[0] * full[1] * full[2];
  set(c.threadgroup_position_in_grid, worker.group[0], worker.group[1], worker.group[2]);
  set(c.threads_per_grid, grid[0], grid[1], grid[2]);
  set(c.grid_size, grid[0], grid[1], grid[2]);
  set(c.grid_origin, 0, 0, 0);
  set(c.threads_per_threadgroup, size[0], size[1], size[2]);
  set(c.dispatch_threads_per_threadgroup, full[0], full[1], full[2]);
  set(c.threadgroups_per_grid, (grid[0] + full[0] - 1) / full[0], (grid[1] + full[1] - 1) / full[1],
      (grid[2] + full[2] - 1) / full[2]);
  c.simdgroups_per_threadgroup.x = (worker.threads + kLanes - 1) / kLanes;
  c.dispatch_simdgroups_per_threadgroup.x = (whole + kLanes - 1) / kLanes;
  c.threads_per_simdgroup.x = c.thread_execution_width.x = kLanes;
  c.quadgroups_per_threadgroup.x = (worker.threads + 3) / 4;
  c.dispatch_quadgroups_per_threadgroup.x = (whole + 3) / 4;
}

static void fill_own(const Worker& worker, uint32_t thread, Context& c) {
  const uint32_t* full = worker.launch->threadgroup;
  const Vector& size = c.threads_per_threadgroup;
  uint32_t x = thread, y = 0, z = 0;
  if (size.y > 1 || size.z > 1) {
    x = thread % size.x;
    y = thread / size.x % size.y;
    z = thread / size.x / size.y;
  }
  set(c.thread_position_in_threadgroup, x, y, z);
  set(c.thread_position_in_grid, worker.group[0] * full[0] + x, worker.group[1] * full[1] + y,
      worker.group[2] * full[2] + z);
  c.thread_index_in_threadgroup.x = thread;
  c.thread_index_in_simdgroup.x = thread % kLanes;
  c.simdgroup_index_in_threadgroup.x = thread / kLanes;
  c.thread_index_in_quadgroup.x = thread % 4;
  c.quadgroup_index_in_threadgroup.x = thread / 4;
}

static void run_fiber() {
  Fiber* me = current_fiber();
  ((Entry)me->worker->launch->entry)(me->worker->arguments, &me->context);
  me->state = State::kReturned;
  abandon(*me->worker);
}

// A kernel in which no thread ever waits runs them all on one stack.
static void run_fibers_in_turn() {
  Fiber* me = current_fiber();
  Worker& worker = *me->worker;
  for (uint32_t i = 0; i < worker.threads; i++) {
    me->thread = i;
    fill_own(worker, i, me->context);
    ((Entry)worker.launch->entry)(worker.arguments, &me->context);
  }
  me->state = State::kReturned;
  abandon(worker);
}

bool run_threadgroup(Worker& worker, uint32_t x, uint32_t y, uint32_t z) {
  const Launch& launch = *worker.launch;
  uint32_t group[3] = {x, y, z}, size[3];
  for (int i = 0; i < 3; i++) {
    uint32_t before = group[i] * launch.threadgroup[i];
    uint32_t rest = launch.grid[i] - before;
    size[i] = rest < launch.threadgroup[i] ? rest : launch.threadgroup[i];
    worker.group[i] = group[i];
  }
  worker.threads = size[0] * size[1] * size[2];
  worker.counts.threadgroups++;
  worker.counts.threads += worker.threads;
  if (worker.listener)
    worker.listener->threadgroup_starts(worker);
  Context common = {};
  fill_common(worker, size, common);
  uint32_t fibers = launch.meets ? worker.threads : 1;
  guard_stacks(worker, fibers);
  for (uint32_t i = 0; i < fibers; i++) {
    Fiber& f = fiber(worker, i);
    f.worker = &worker;
    f.state = State::kRunnable;
    f.thread = i;
    f.caller = f.coming_round = 0;
    f.context = common;
    fill_own(worker, i, f.context);
    f.stack = prepared_stack(top_of((uintptr_t)worker.stacks + i * kStackBytes),
                             launch.meets ? run_fiber : run_fibers_in_turn);
  }
  if (!launch.meets) {
    resume(worker, fiber(worker, 0));
    return worker.outcome->status == kFinished;
  }
  return schedule(worker);
}

}  // namespace emulator
