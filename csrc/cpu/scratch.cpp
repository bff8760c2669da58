#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace moefast {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded(size_t size, size_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

}  // namespace

Scratch::~Scratch() {
  clear();
}

void Scratch::clear() {
  for (const Block& block : blocks_) {
    std::free(block.data);
  }
  blocks_.clear();
  held_ = 0;
}

void Scratch::add(size_t size) {
  // Whole huge pages for what spans several: one page fault instead of hundreds.
  const size_t alignment = size >= 2 * kHugePage ? kHugePage : 4096;
  size = rounded(size, alignment);
  blocks_.reserve(blocks_.size() + 1);
  void* data = nullptr;
  if (posix_memalign(&data, alignment, size) != 0) {
    throw std::bad_alloc();
  }
#ifdef __linux__
  if (alignment == kHugePage) {
    madvise(data, size, MADV_HUGEPAGE);  // advice: nothing is lost where it is not taken
  }
#endif
  blocks_.push_back({static_cast<char*>(data), size, 0});
  held_ += size;
}

void* Scratch::bytes(size_t size) {
  size = rounded(std::max(size, kLine), kLine);
  if (blocks_.empty() || blocks_.back().size - blocks_.back().used < size) {
    add(std::max(size, size_t{64} << 10));
  }
  Block& block = blocks_.back();
  void* taken = block.data + block.used;
  block.used += size;
  return taken;
}

void Scratch::reset() {
  if (blocks_.size() == 1 && held_ <= kKept) {
    blocks_.back().used = 0;
    return;
  }
  const size_t used = held_;
  clear();
  if (used != 0 && used <= kKept) {
    add(used);
  }
}

}  // namespace moefast
