// Bounds, alignment, counters, and what the schedule reports.
#include "check.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace emulator {

Check check;

constexpr uint64_t kSinkBytes = 1 << 20;
constexpr uint16_t kEarlier = 1;  // the mark of threadgroups whose own mark is used again
// Threadgroup variables lie this far apart, so that an access beyond one does not hit the next.
constexpr uint32_t kVariableSlot = 1 << 17;

static void* map(uint64_t bytes, int protection = PROT_READ | PROT_WRITE) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

bool Check::open(uint32_t count) {
  buffer_count = count;
  arena = (uint8_t*)map((count + 1) * kSlotBytes, PROT_NONE);
  sink = (uint8_t*)map(kSinkBytes);
  threadgroup_shadow = (Shadow*)map(kThreadgroupMapping * sizeof(Shadow));
  worker = make_worker();
  filled = -1;
  mark = kEarlier;
  return arena && sink && threadgroup_shadow && worker;
}

void Check::bind(uint32_t slot, uint64_t bytes, int32_t index, bool writable, bool initialised) {
  Buffer& b = buffers[slot];
  b = {place(slot), bytes, nullptr, nullptr, writable, initialised, index, {}};
  b.touched = (uint16_t*)map((bytes + 16) * sizeof(uint16_t));
  if (writable)
    b.shadow = (Shadow*)map((bytes + 16) * sizeof(Shadow));
}

Finding& Check::report(Kind kind, uint32_t site, const Fiber* fiber) {
  for (uint32_t i = 0; i < finding_count; i++)
    if (findings[i].kind == kind && findings[i].site == site) {
      findings[i].count++;
      // What a caller writes into it is that of the first one: give it somewhere else to write.
      static Finding repeated;
      repeated = findings[i];
      return repeated;
    }
  static Finding lost;
  if (finding_count == sizeof findings / sizeof *findings)
    return lost;
  Finding& f = findings[finding_count++];
  f = {};
  f.kind = kind, f.site = site, f.count = 1, f.buffer = -1;
  f.thread = fiber ? fiber->thread : 0;
  for (int i = 0; i < 3; i++)
    f.group[i] = worker->group[i];
  return f;
}

void* Check::access(
    Space space, void* pointer, uint64_t bytes, uint32_t alignment, uint32_t site, Access kind) {
  auto* p = (uint8_t*)pointer;
  if ((uint64_t)(p - arena) < (buffer_count + 1) * kSlotBytes)
    return device(p, bytes, alignment, site, kind);
  if ((uint64_t)(p - worker->memory) < kThreadgroupMapping)
    return threadgroup(p, bytes, alignment, site, kind);
  return elsewhere(p, bytes, site, kind, space);
}

void* Check::device(uint8_t* p, uint64_t bytes, uint32_t alignment, uint32_t site, Access kind) {
  uint64_t slot = (uint64_t)(p - arena) / kSlotBytes;
  if (slot >= buffer_count)
    return elsewhere(p, bytes, site, kind, kDeviceSpace);
  Buffer& b = buffers[slot];
  int64_t offset = p - b.start;
  if (offset < 0 || (uint64_t)offset + bytes > b.bytes) {
    Finding& f =
        report(reads_only(kind) ? kDeviceReadBounds : kDeviceWriteBounds, site, worker->running);
    f.buffer = b.index, f.offset = offset, f.size = (int64_t)b.bytes, f.bytes = (uint32_t)bytes,
    f.detail = kind;
    return sink;
  }
  if ((uint64_t)p & (alignment - 1)) {
    Finding& f = report(kMisaligned, site, worker->running);
    f.buffer = b.index, f.offset = offset, f.size = (int64_t)b.bytes, f.bytes = (uint32_t)bytes;
    f.detail = kind, f.detail2 = alignment;
  }
  if (!b.writable && !reads_only(kind)) {
    Finding& f = report(kReadOnlyWrite, site, worker->running);
    f.buffer = b.index, f.offset = offset, f.size = (int64_t)b.bytes, f.bytes = (uint32_t)bytes;
    return sink;
  }
  count(b, (uint64_t)offset, bytes, kind);
  if (b.shadow)
    follow(b.shadow + offset, p, bytes, site, kind, 0, b.index, (uint64_t)offset, b.bytes,
           !b.initialised);
  return p;
}

void Check::count(Buffer& b, uint64_t offset, uint64_t bytes, Access kind) {
  BufferCounts& c = b.counts;
  if (is_atomic(kind)) {
    c.atomics++, atomics++;
  } else if (kind == kRead) {
    c.loads++, c.loaded += bytes;
  } else {
    c.stores++, c.stored += bytes;
  }
  touch(b, offset, bytes);
}

void Check::touch(Buffer& b, uint64_t offset, uint64_t bytes) {
  uint16_t* touched = b.touched + offset;
  for (uint64_t i = 0; i < bytes; i++) {
    if (touched[i] == mark)
      continue;
    b.counts.touched += touched[i] == 0;
    b.counts.distinct++;
    touched[i] = mark;
  }
}

// Bytes that this threadgroup has touched before are the common case, and told by comparing four at
// a time.
template <uint64_t bytes>
bool Check::is_touched(const uint16_t* touched) const {
  uint64_t known = mark * 0x0001000100010001ull, found = 0, differs = 0;
  for (uint64_t i = 0; i < bytes; i += 4) {
    constexpr uint64_t some = bytes < 4 ? bytes : 4;
    memcpy(&found, touched + i, some * sizeof *touched);
    differs |= (found ^ known) << (64 - 16 * some);
  }
  return !differs;
}

template <uint64_t bytes>
void* Check::read(Space space, void* pointer, uint32_t alignment, uint32_t site) {
  auto* p = (uint8_t*)pointer;
  uint64_t slot = (uint64_t)(p - arena) / kSlotBytes;
  if (slot < buffer_count && !((uint64_t)p & (alignment - 1))) {
    Buffer& b = buffers[slot];
    uint64_t offset = (uint64_t)(p - b.start);  // large where it lies before the buffer
    if (!b.shadow && offset < b.bytes && b.bytes - offset >= bytes) {
      b.counts.loads++, b.counts.loaded += bytes;
      if (!is_touched<bytes>(b.touched + offset))
        touch(b, offset, bytes);
      return p;
    }
  }
  return access(space, p, bytes, alignment, site, kRead);
}

void Check::age_marks() {
  for (uint32_t slot = 0; slot < buffer_count; slot++)
    for (uint64_t i = 0; i < buffers[slot].bytes; i++)
      buffers[slot].touched[i] = buffers[slot].touched[i] ? kEarlier : 0;
  mark = kEarlier;
}

void* Check::threadgroup(
    uint8_t* p, uint64_t bytes, uint32_t alignment, uint32_t site, Access kind) {
  uint32_t offset = (uint32_t)(p - worker->memory), slot = offset / kVariableSlot;
  if (is_atomic(kind))
    atomics++;
  else
    (kind == kRead ? threadgroup_loaded : threadgroup_stored) += bytes;
  const ThreadgroupVariable* v = slot < worker->variable_count ? &worker->variables[slot] : nullptr;
  int64_t in_variable = v ? (int64_t)offset - v->offset : 0;
  if (!v || in_variable < 0 || (uint64_t)in_variable + bytes > v->bytes) {
    Finding& f = report(reads_only(kind) ? kThreadgroupReadBounds : kThreadgroupWriteBounds, site,
                        worker->running);
    f.buffer = v ? (int32_t)v->id : -1, f.offset = in_variable, f.size = v ? v->bytes : 0,
    f.bytes = (uint32_t)bytes;
    return sink;
  }
  if ((uint64_t)p & (alignment - 1)) {
    Finding& f = report(kMisaligned, site, worker->running);
    f.buffer = (int32_t)v->id, f.offset = in_variable, f.size = v->bytes, f.bytes = (uint32_t)bytes;
    f.detail = kind | 16, f.detail2 = alignment;
  }
  follow(threadgroup_shadow + offset, p, bytes, site, kind, 1, (int32_t)v->id,
         (uint64_t)in_variable, v->bytes, true);
  return p;
}

// A generic pointer may point to a thread's own variables; a constant one to the kernel's
// constants.
void* Check::elsewhere(uint8_t* p, uint64_t bytes, uint32_t site, Access kind, Space space) {
  if (space == kGenericSpace && (uint64_t)(p - worker->stacks) < kMostThreads * kStackBytes)
    return p;
  for (uint64_t i = 0; i < constant_count; i++) {
    uint64_t start = constants[2 * i], end = start + constants[2 * i + 1];
    if ((uint64_t)p >= start && (uint64_t)p + bytes <= end)
      return p;
  }
  Finding& f = report(kWildAccess, site, worker->running);
  f.offset = (int64_t)(uint64_t)p, f.bytes = (uint32_t)bytes, f.detail = kind;
  return sink;
}

void Check::threadgroup_starts(Worker& w) {
  if (group_number + 1 >= group_capacity) {
    group_capacity = group_capacity ? 2 * group_capacity : 1024;
    group_times = (uint32_t*)realloc(group_times, group_capacity * sizeof *group_times);
    groups = (uint32_t (*)[3])realloc(groups, group_capacity * sizeof *groups);
  }
  group_start = ++now;
  group_times[group_number] = now;
  memcpy(groups[group_number], w.group, sizeof *groups);
  group_number++;
  if (mark == UINT16_MAX)
    age_marks();
  mark++;
  barrier_time[0] = barrier_time[1] = now;
  for (uint32_t i = 0; i < kLanes; i++)
    simd_time[0][i] = simd_time[1][i] = now;
  // Nobody may count on what threadgroup memory holds at first; make what they find unlikely to be
  // right.
  for (uint32_t i = 0; i < w.variable_count; i++)
    memset(w.memory + w.variables[i].offset, 0xff, w.variables[i].bytes);
}

static const uint32_t kFence[2] = {kDevice, kThreadgroup};

void Check::barrier_passed(Worker&, uint32_t flags) {
  now++;
  for (int memory = 0; memory < 2; memory++)
    if (flags & kFence[memory]) {
      barrier_time[memory] = now;
      for (uint32_t i = 0; i < kLanes; i++)
        simd_time[memory][i] = now;
    }
}

void Check::simd_barrier_passed(Worker&, uint32_t simdgroup, uint32_t flags) {
  now++;
  for (int memory = 0; memory < 2; memory++)
    if (flags & kFence[memory])
      simd_time[memory][simdgroup] = now;
}

void Check::simd_diverges(
    Worker&, Fiber& first, Fiber* other, uint32_t mask, uint32_t live, uint32_t whole) {
  Finding& f = report(other ? kSimdDivergence : kSimdPartial, first.site, &first);
  if (other)
    f.other_site = other->site, f.other_thread = other->thread;
  f.detail = mask, f.detail2 = other ? live : whole, f.bytes = first.operation;
  f.size = other && other->pc == first.pc;
}

void Check::barrier_diverges(Worker&, Fiber& waits, Fiber* other, uint32_t returned) {
  Finding& f = report(kBarrierDivergence, waits.site, &waits);
  if (other)
    f.other_site = other->site, f.other_thread = other->thread;
  f.detail = returned, f.detail2 = other != nullptr;
  f.size = other && other->pc == waits.pc;
}

void Check::too_much_threadgroup_memory(Worker& w, uint32_t bytes, uint32_t site) {
  report(kThreadgroupMemory, site, w.running).size = bytes;
}

void Check::place_variable(Worker& w, ThreadgroupVariable& v) {
  uint32_t slot = (uint32_t)(&v - w.variables);
  v.offset = slot * kVariableSlot + kVariableSlot / 4;
  memset(w.memory + v.offset, 0xff, v.bytes);
}

}  // namespace emulator

using namespace emulator;

MSL_EXPORT void msl_check_round(uint64_t round) {
  current_fiber()->coming_round = round;
}

#define CHECK_SIZE(space, Space, kind, Kind, n)                                                   \
  MSL_EXPORT void* msl_check_##space##_##kind##_##n(void* p, uint32_t alignment, uint32_t site) { \
    return check.access(Space, p, n, alignment, site, Kind);                                      \
  }
#define CHECK_READ(space, Space, n)                                                           \
  MSL_EXPORT void* msl_check_##space##_load_##n(void* p, uint32_t alignment, uint32_t site) { \
    return check.read<n>(Space, p, alignment, site);                                          \
  }
// What is stored comes along: two writes of the same value are a race of another kind.
#define CHECK_STORE(space, Space, n, Bits)                                                \
  MSL_EXPORT void* msl_check_##space##_store_##n(void* p, Bits value, uint32_t alignment, \
                                                 uint32_t site) {                         \
    check.stored = &value;                                                                \
    void* checked = check.access(Space, p, n, alignment, site, kWrite);                   \
    check.stored = nullptr;                                                               \
    return checked;                                                                       \
  }
#define CHECK_ANY(space, Space, kind, Kind)                                                \
  MSL_EXPORT void* msl_check_##space##_##kind##_n(void* p, uint64_t n, uint32_t alignment, \
                                                  uint32_t site) {                         \
    return n ? check.access(Space, p, n, alignment, site, Kind) : p;                       \
  }
#define CHECK_COPY(space, Space)                                                     \
  MSL_EXPORT void* msl_check_##space##_copy_n(void* p, const void* from, uint64_t n, \
                                              uint32_t alignment, uint32_t site) {   \
    check.stored = from;                                                             \
    void* checked = n ? check.access(Space, p, n, alignment, site, kWrite) : p;      \
    check.stored = nullptr;                                                          \
    return checked;                                                                  \
  }
#define CHECK_FILL(space, Space)                                                   \
  MSL_EXPORT void* msl_check_##space##_fill_n(void* p, uint8_t byte, uint64_t n,   \
                                              uint32_t alignment, uint32_t site) { \
    check.filled = byte;                                                           \
    void* checked = n ? check.access(Space, p, n, alignment, site, kWrite) : p;    \
    check.filled = -1;                                                             \
    return checked;                                                                \
  }
#define CHECK_LANES(space, Space)                                                              \
  MSL_EXPORT void* msl_check_##space##_load_lanes(                                             \
      void* p, uint64_t n, uint32_t bytes, uint32_t used, uint32_t alignment, uint32_t site) { \
    check.lane_bytes = bytes, check.unused = ~used;                                            \
    void* checked = check.access(Space, p, n, alignment, site, kRead);                         \
    check.lane_bytes = check.unused = 0;                                                       \
    return checked;                                                                            \
  }                                                                                            \
  MSL_EXPORT void* msl_check_##space##_store_lanes(void* p, const void* from, uint64_t n,      \
                                                   uint32_t bytes, uint32_t written_back,      \
                                                   uint32_t alignment, uint32_t site) {        \
    check.lane_bytes = bytes, check.written_back = written_back, check.stored = from;          \
    void* checked = check.access(Space, p, n, alignment, site, kWrite);                        \
    check.lane_bytes = check.written_back = 0, check.stored = nullptr;                         \
    return checked;                                                                            \
  }
#define CHECK_KIND(space, Space, kind, Kind) \
  CHECK_SIZE(space, Space, kind, Kind, 1)    \
  CHECK_SIZE(space, Space, kind, Kind, 2)    \
  CHECK_SIZE(space, Space, kind, Kind, 4)    \
  CHECK_SIZE(space, Space, kind, Kind, 8)    \
  CHECK_SIZE(space, Space, kind, Kind, 16)   \
  CHECK_ANY(space, Space, kind, Kind)
#define CHECK_SPACE(space, Space)                    \
  CHECK_READ(space, Space, 1)                        \
  CHECK_READ(space, Space, 2)                        \
  CHECK_READ(space, Space, 4)                        \
  CHECK_READ(space, Space, 8)                        \
  CHECK_READ(space, Space, 16)                       \
  CHECK_ANY(space, Space, load, kRead)               \
  CHECK_STORE(space, Space, 1, uint8_t)              \
  CHECK_STORE(space, Space, 2, uint16_t)             \
  CHECK_STORE(space, Space, 4, uint32_t)             \
  CHECK_STORE(space, Space, 8, uint64_t)             \
  CHECK_STORE(space, Space, 16, unsigned __int128)   \
  CHECK_LANES(space, Space)                          \
  CHECK_FILL(space, Space)                           \
  CHECK_COPY(space, Space)                           \
  CHECK_KIND(space, Space, atomic, kUpdate)          \
  CHECK_KIND(space, Space, atomic_load, kAtomicRead) \
  CHECK_KIND(space, Space, atomic_store, kAtomicWrite)
CHECK_SPACE(device, kDeviceSpace)
CHECK_SPACE(constant, kConstantSpace)
CHECK_SPACE(threadgroup, kThreadgroupSpace)
CHECK_SPACE(generic, kGenericSpace)
