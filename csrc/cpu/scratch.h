// Memory for intermediate results: taken piece by piece, given back all at once.
#ifndef MOEFAST_CPU_SCRATCH_H
#define MOEFAST_CPU_SCRATCH_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moefast {

// Fresh pages cost more than the arithmetic done in them, so memory is kept from one operation to
// the next, up to kKept bytes. Not thread-safe.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{96} << 20;

  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `count` values of T, uninitialised, aligned to 64 bytes. Throws std::bad_alloc.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  // Ends every loan. What was taken in several blocks becomes one, for the next operation.
  void reset();

  // Bytes held now.
  size_t held() const { return held_; }

 private:
  struct Block {
    char* data;
    size_t size;
    size_t used;
  };
  void* bytes(size_t size);
  void add(size_t size);
  void clear();

  std::vector<Block> blocks_;
  size_t held_ = 0;
};

}  // namespace moefast

#endif
