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

}  // namespace

extern "C" int64_t moefast_huge_pages(const void* from, int64_t bytes) {
  int64_t done = 0;
#ifdef MADV_COLLAPSE
  static const uintptr_t size = huge_page_size();
  if (size == 0 || bytes <= 0) {
    return 0;
  }
  const auto begin = reinterpret_cast<uintptr_t>(from);
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) & ~(size - 1);
  for (uintptr_t page = (begin + size - 1) & ~(size - 1); page < end;) {
    // Some at a time: where the system runs out of them, the ones before have been counted.
    const uintptr_t count = std::min<uintptr_t>(end - page, 16 * size);
    if (madvise(reinterpret_cast<void*>(page), count, MADV_COLLAPSE) == 0) {
      done += static_cast<int64_t>(count);
    }
    page += count;
  }
#else
  (void)from;
  (void)bytes;
#endif
  return done;
}
