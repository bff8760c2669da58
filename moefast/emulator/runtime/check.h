// Check mode: what is known of the memory of a launch, and what went wrong. One OS thread runs all
// threadgroups, one after another, so nothing here needs a lock.
#pragma once
#include "worker.h"

namespace emulator {

// The order of kinds is that of report.py.
enum Kind : uint32_t {
  kDeviceReadBounds,
  kDeviceWriteBounds,
  kThreadgroupReadBounds,
  kThreadgroupWriteBounds,
  kWildAccess,
  kMisaligned,
  kDeviceUninitialised,
  kThreadgroupUninitialised,
  kDeviceRace,
  kThreadgroupRace,
  kBarrierDivergence,
  kSimdDivergence,
  kSimdPartial,
  kThreadgroupMemory,
  kReadOnlyWrite,
  kDeviceEqualWrites,
  kThreadgroupEqualWrites,
};

// Read by child.py.
struct Finding {
  uint32_t kind, site, other_site, count;
  uint32_t thread, other_thread;
  uint32_t group[3], other_group[3];
  int32_t buffer;  // -1: none; threadgroup variables: their number
  uint32_t bytes;
  int64_t offset, size;      // of the access in its buffer, of the buffer; divergence: size is 1
                             // where the other side waits at the same place in another round
  uint32_t detail, detail2;  // access: 0 read, 1 write, 2 atomic; masks, counts
};

struct BufferCounts {
  uint64_t loaded, stored, loads, stores, atomics, touched, distinct;
};

// The last write and the last read of a byte. `time` is 0 for never; it grows with every barrier
// and threadgroup.
struct Shadow {
  uint32_t write_time, write_site, read_time, read_site;
  uint16_t write_thread, read_thread;
  uint8_t write_flags, read_flags;
};
enum ShadowFlags : uint8_t {
  kAtomic = 1,      // the access was
  kSeveral = 2,     // other lanes of its simdgroup too, since the last simdgroup barrier
  kSimdgroups = 4,  // other simdgroups too, since the last barrier
  kGroups = 8,      // other threadgroups too
};

struct Buffer {
  uint8_t* start;
  uint64_t bytes;
  Shadow* shadow;     // null for what the kernel cannot write
  uint16_t* touched;  // per byte, the mark of the threadgroup that touched it last; 0: none did
  bool writable, initialised;
  int32_t index;
  BufferCounts counts;
};

enum Access : uint32_t { kRead, kWrite, kUpdate, kAtomicRead, kAtomicWrite };
inline bool is_atomic(Access a) {
  return a >= kUpdate;
}
inline bool reads_only(Access a) {
  return a == kRead || a == kAtomicRead;
}
inline bool writes_only(Access a) {
  return a == kWrite || a == kAtomicWrite;
}
enum Space : uint32_t { kDeviceSpace, kConstantSpace, kThreadgroupSpace, kGenericSpace };

// Of address space for each buffer, which lies in the middle: an index that wrapped, 2^32 elements
// of 16 bytes off, is still told with the buffer it was meant for.
constexpr uint64_t kSlotBytes = 1ull << 37;

struct Check : Listener {
  Worker* worker;
  Buffer buffers[kBuffers];
  uint32_t buffer_count;
  uint8_t* arena;
  uint8_t* sink;  // where accesses go that must not happen
  Shadow* threadgroup_shadow;
  uint64_t* constants;  // address and bytes, in pairs
  uint64_t constant_count;

  uint32_t now, group_start, group_number;
  uint16_t mark;                  // of the present threadgroup; marks are few, and used again
  uint32_t barrier_time[2];       // by Memory: when all threads last met
  uint32_t simd_time[2][kLanes];  // and those of each simdgroup
  uint32_t* group_times;          // when each threadgroup started
  uint32_t group_capacity;
  uint32_t (*groups)[3];
  uint64_t threadgroup_loaded, threadgroup_stored, atomics;

  Finding findings[256];
  uint32_t finding_count;
  const void* stored;  // by the present write, if that is known
  // Lanes of the present access of a vector, whose bytes are `lane_bytes` each, or 0: those that
  // are not read, or that are written back as they were.
  uint32_t lane_bytes, unused, written_back;
  int32_t filled;  // with which byte the present write fills memory; -1: it does not

  bool open(uint32_t buffer_count);
  uint8_t* place(uint32_t slot) const { return arena + slot * kSlotBytes + kSlotBytes / 2; }
  void bind(uint32_t slot, uint64_t bytes, int32_t index, bool writable, bool initialised);

  void* access(Space, void* p, uint64_t bytes, uint32_t alignment, uint32_t site, Access);
  // `access` that reads, and in most cases finds nothing to do but to count.
  template <uint64_t bytes>
  void* read(Space, void* p, uint32_t alignment, uint32_t site);
  Finding& report(Kind, uint32_t site, const Fiber*);

  void threadgroup_starts(Worker&) override;
  void barrier_passed(Worker&, uint32_t flags) override;
  void simd_barrier_passed(Worker&, uint32_t simdgroup, uint32_t flags) override;
  void simd_diverges(
      Worker&, Fiber&, Fiber*, uint32_t mask, uint32_t live, uint32_t whole) override;
  void barrier_diverges(Worker&, Fiber&, Fiber*, uint32_t returned) override;
  void too_much_threadgroup_memory(Worker&, uint32_t bytes, uint32_t site) override;
  void place_variable(Worker&, ThreadgroupVariable&) override;

 private:
  void* device(uint8_t* p, uint64_t bytes, uint32_t alignment, uint32_t site, Access);
  void* threadgroup(uint8_t* p, uint64_t bytes, uint32_t alignment, uint32_t site, Access);
  void* elsewhere(uint8_t* p, uint64_t bytes, uint32_t site, Access, Space);
  template <uint64_t bytes>
  bool is_touched(const uint16_t* touched) const;
  void touch(Buffer&, uint64_t offset, uint64_t bytes);
  void age_marks();
  void count(Buffer&, uint64_t offset, uint64_t bytes, Access);
  // Records an access in the shadow of its bytes; reports what it races with.
  void follow(Shadow*,
              const uint8_t* p,
              uint64_t bytes,
              uint32_t site,
              Access,
              int memory,
              int32_t buffer,
              uint64_t offset,
              uint64_t size,
              bool must_be_written);
  void race(Kind,
            const Shadow&,
            bool with_write,
            uint32_t site,
            Access,
            int32_t buffer,
            uint64_t offset,
            uint64_t size,
            uint64_t bytes);
};

extern Check check;

}  // namespace emulator
