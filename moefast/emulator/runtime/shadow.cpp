// Races: two accesses of a byte by different threads, one of them a write and not both atomic, that
// nothing orders.
//
// Threads of a threadgroup are ordered by a barrier that fences the memory in question; lanes of a
// simdgroup also by such a simdgroup barrier; threadgroups of one launch by nothing. A time that
// grows with every barrier and every threadgroup tells what came before which. The shadow keeps the
// last write and the last read of each byte; flags say whether others, which the last one does not
// order, read or updated it too.
#include "check.h"

namespace emulator {

namespace {

struct Now {
  uint32_t group_start, barrier, simd;
  uint16_t thread;
  bool other_simdgroup(uint16_t t) const { return t / kLanes != thread / kLanes; }
};

// Whether an access recorded at `time` by `thread` is unordered with one of now.
bool unordered(const Now& now, uint32_t time, uint16_t thread, uint8_t flags) {
  if (!time)
    return false;
  if (time < now.group_start || flags & kGroups)
    return true;
  if (time < now.barrier)
    return false;
  if (flags & kSimdgroups || now.other_simdgroup(thread))
    return true;
  if (time < now.simd)
    return false;
  return flags & kSeveral || thread != now.thread;
}

// The flags of a record that the present access replaces.
uint8_t carried(const Now& now, uint32_t time, uint16_t thread, uint8_t flags, bool forget_groups) {
  if (!time)
    return 0;
  uint8_t kept = flags & kGroups;
  if (time < now.group_start)
    return forget_groups ? 0 : kGroups;
  if (time < now.barrier)
    return kept;
  kept |= flags & kSimdgroups;
  if (now.other_simdgroup(thread))
    return kept | kSimdgroups;
  if (time < now.simd)
    return kept;
  return kept | (flags & kSeveral) | (thread != now.thread ? kSeveral : 0);
}

}  // namespace

void Check::follow(Shadow* shadow,
                   const uint8_t* p,
                   uint64_t bytes,
                   uint32_t site,
                   Access access,
                   int memory,
                   int32_t buffer,
                   uint64_t offset,
                   uint64_t size,
                   bool must_be_written) {
  const Fiber& me = *worker->running;
  Now at = {group_start, barrier_time[memory], simd_time[memory][me.thread / kLanes],
            (uint16_t)me.thread};
  bool raced = false, missing = false;
  Shadow equal;  // of an unordered write of the same byte
  uint64_t equal_at = bytes;
  for (uint64_t i = 0; i < bytes; i++) {
    Shadow& s = shadow[i];
    // Threadgroup memory starts anew with each threadgroup: what was there is gone.
    if (memory && s.write_time < group_start)
      s.write_time = 0, s.write_flags = 0;
    if (memory && s.read_time < group_start)
      s.read_time = 0, s.read_flags = 0;
    if (!writes_only(access) && must_be_written && !s.write_time && !missing) {
      missing = true;
      Finding& f = report(memory ? kThreadgroupUninitialised : kDeviceUninitialised, site, &me);
      f.buffer = buffer, f.offset = (int64_t)(offset + i), f.size = (int64_t)size,
      f.bytes = (uint32_t)bytes;
    }
    // Whichever of two writes of the same value comes last, the result is that value: a race of a
    // kind of its own, if that holds for all of the access.
    int32_t byte = stored ? ((const uint8_t*)stored)[i] : filled;
    bool same = access == kWrite && byte == p[i];
    bool both_atomic = is_atomic(access) && s.write_flags & kAtomic;
    if (!raced && !both_atomic && unordered(at, s.write_time, s.write_thread, s.write_flags)) {
      if (!same) {
        race(memory ? kThreadgroupRace : kDeviceRace, s, true, site, access, buffer, offset + i,
             size, bytes);
        raced = true;
      } else if (equal_at == bytes) {
        equal = s, equal_at = i;
      }
    }
    bool atomic_readers = is_atomic(access) && s.read_flags & kAtomic;
    if (!raced && !reads_only(access) && !atomic_readers &&
        unordered(at, s.read_time, s.read_thread, s.read_flags)) {
      race(memory ? kThreadgroupRace : kDeviceRace, s, false, site, access, buffer, offset + i,
           size, bytes);
      raced = true;
    }
    if (reads_only(access)) {
      // Atomic as long as all are whom the last one does not order.
      uint8_t atomic = is_atomic(access) && (!s.read_time || s.read_flags & kAtomic) ? kAtomic : 0;
      s.read_flags = atomic | carried(at, s.read_time, s.read_thread, s.read_flags, false);
      s.read_time = now, s.read_thread = at.thread, s.read_site = site;
    } else {
      bool adds = same || (is_atomic(access) && s.write_flags & kAtomic);
      uint8_t kept = adds ? carried(at, s.write_time, s.write_thread, s.write_flags, false) : 0;
      s.write_flags = kept | (is_atomic(access) ? kAtomic : 0);
      s.write_time = now, s.write_thread = at.thread, s.write_site = site;
    }
  }
  if (!raced && equal_at < bytes && !worker->launch->allow_equal_writes)
    race(memory ? kThreadgroupEqualWrites : kDeviceEqualWrites, equal, true, site, access, buffer,
         offset + equal_at, size, bytes);
}

void Check::race(Kind kind,
                 const Shadow& s,
                 bool with_write,
                 uint32_t site,
                 Access access,
                 int32_t buffer,
                 uint64_t offset,
                 uint64_t size,
                 uint64_t bytes) {
  Finding& f = report(kind, site, worker->running);
  if (f.count > 1)
    return;
  uint32_t time = with_write ? s.write_time : s.read_time;
  f.buffer = buffer, f.offset = (int64_t)offset, f.size = (int64_t)size, f.bytes = (uint32_t)bytes;
  f.other_site = with_write ? s.write_site : s.read_site;
  f.other_thread = with_write ? s.write_thread : s.read_thread;
  f.detail = access;
  f.detail2 = !with_write ? kRead : s.write_flags & kAtomic ? kUpdate : kWrite;
  uint32_t low = 0, high = group_number;
  while (low + 1 < high) {
    uint32_t middle = (low + high) / 2;
    if (group_times[middle] <= time)
      low = middle;
    else
      high = middle;
  }
  for (int i = 0; i < 3; i++)
    f.other_group[i] = groups[low][i];
}

}  // namespace emulator
