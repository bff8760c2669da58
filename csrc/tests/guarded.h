// Memory whose neighbours must not be touched: one access outside ends the test.
#ifndef MOEFAST_TESTS_GUARDED_H
#define MOEFAST_TESTS_GUARDED_H

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace moefast::testing {

// Bytes that end (or begin) exactly where an inaccessible page begins (or ends). At the end their
// address has whatever alignment their number leaves it.
class Guarded {
 public:
  enum Side { kBegin, kEnd };

  explicit Guarded(size_t size, Side side = kEnd) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (size + page - 1) / page * page;
    bytes_ = body + 2 * page;
    void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (map == MAP_FAILED) {
      std::abort();
    }
    map_ = static_cast<uint8_t*>(map);
    mprotect(map_, page, PROT_NONE);
    mprotect(map_ + page + body, page, PROT_NONE);
    data_ = map_ + page + (side == kEnd ? body - size : 0);
  }
  ~Guarded() { munmap(map_, bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* map_;
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace moefast::testing

#endif
