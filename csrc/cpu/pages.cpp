// Memory in huge pages: a core that reads weights at full speed comes to another page of 4 KB every
// third of a microsecond, and has to look up each where it lies.
#include <algorithm>
#include <cstdint>
#include <fstream>

#include "moefast.h"

#ifdef __linux__
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; older kernels refuse it
#endif
#endif

namespace {

// Bytes, a power of two; 0 where the system has none for ordinary memory.
[[maybe_unused]] uintptr_t huge_page_size() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
  uintptr_t size = 0;
  return file >> size && (size & (size - 1)) == 0 ? size : 0;
}

// Bytes of an array that are worth a request.
[[maybe_unused]] constexpr int64_t kWorthwhile = 64 << 10;

}  // namespace

extern "C" int64_t moefast_huge_pages(const void* from, int64_t bytes) {
  int64_t done = 0;
#ifdef MADV_COLLAPSE
  static const uintptr_t size = huge_page_size();
  if (size == 0 || bytes < kWorthwhile) {
    return 0;
  }
  const auto begin = reinterpret_cast<uintptr_t>(from);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + size - 1) & ~(size - 1), last = end & ~(size - 1);
  const auto collapse = [&](uintptr_t page, uintptr_t count) {
    if (madvise(reinterpret_cast<void*>(page), count, MADV_COLLAPSE) == 0) {
      done += static_cast<int64_t>(std::min(page + count, end) - std::max(page, begin));
    }
  };
  // Those that it shares with its neighbours, too: most matrices outside the stacks of experts are
  // no larger than a page. The system refuses where not all of it is memory alike.
  if (begin < first) {
    collapse(first - size, size);
  }
  for (uintptr_t page = first; page < last;) {
    // Some at a time: where the system runs out of them, the ones before have been counted.
    const uintptr_t count = std::min<uintptr_t>(last - page, 16 * size);
    collapse(page, count);
    page += count;
  }
  if (last < end && first <= last) {
    collapse(last, size);
  }
#else
  (void)from;
  (void)bytes;
#endif
  return done;
}
