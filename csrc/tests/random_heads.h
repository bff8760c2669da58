// Queries, keys and values where tests want them.
#ifndef MOEFAST_TESTS_RANDOM_HEADS_H
#define MOEFAST_TESTS_RANDOM_HEADS_H

#include <memory>
#include <vector>

#include "guarded.h"
#include "weights.h"

namespace moefast::testing {

// [batch, heads, length, dims] that ends, or begins, beside a page that must not be touched. Rows
// are `gap` values apart; with `by_row` the heads of a position follow one another.
class Heads {
 public:
  Heads(int dtype,
        int64_t batch,
        int64_t heads,
        int64_t length,
        int64_t dims,
        int64_t gap,
        bool by_row,
        uint64_t seed)
      : gap_(gap) {
    const int64_t row = dims + gap;
    const int64_t rows = batch * heads * length;
    about_ = {nullptr,
              dtype,
              batch,
              heads,
              length,
              dims,
              heads * length * row,
              by_row ? row : length * row,
              by_row ? heads * row : row};
    const int64_t count = rows == 0 ? 0 : rows * row - gap;
    memory_ = std::make_unique<Guarded>(static_cast<size_t>(count * size_of(dtype)),
                                        seed % 2 ? Guarded::kBegin : Guarded::kEnd);
    about_.data = memory_->data();
    Random random(seed);
    for (int64_t i = 0; i < count; ++i) {
      put(dtype, random.normal(), memory_->data() + i * size_of(dtype));
    }
  }

  const moefast_heads& about() const { return about_; }
  uint8_t* at(int64_t batch, int64_t head, int64_t row, int64_t i) const {
    const int64_t index =
        batch * about_.batch_stride + head * about_.head_stride + row * about_.row_stride + i;
    return memory_->data() + index * size_of(about_.dtype);
  }
  // All of them, [batch, heads, length, dims].
  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t b = 0; b < about_.batch; ++b) {
      for (int64_t h = 0; h < about_.heads; ++h) {
        for (int64_t row = 0; row < about_.length; ++row) {
          for (int64_t i = 0; i < about_.dims; ++i) {
            all.push_back(value_of(about_.dtype, at(b, h, row, i)));
          }
        }
      }
    }
    return all;
  }

  // What lies between the rows, which is nobody's.
  std::vector<double> gaps() const {
    const int64_t row = about_.dims + gap_;
    const int64_t rows = about_.batch * about_.heads * about_.length;
    std::vector<double> all;
    for (int64_t i = 0; i < rows * row - gap_; ++i) {
      if (i % row >= about_.dims) {
        all.push_back(value_of(about_.dtype, memory_->data() + i * size_of(about_.dtype)));
      }
    }
    return all;
  }

 private:
  int64_t gap_;
  moefast_heads about_{};
  std::unique_ptr<Guarded> memory_;
};

}  // namespace moefast::testing

#endif
