// Rows of activations, ready for a product, and its result: memory that tells who leaves it.
#ifndef MOEFAST_TESTS_ROWS_H
#define MOEFAST_TESTS_ROWS_H

#include <memory>
#include <vector>

#include "guarded.h"
#include "isa.h"
#include "weights.h"

namespace moefast::testing {

// Activations in their dtype, as float64, and prepared.
class Rows {
 public:
  // `activation(i)` is asked for every value i of a row, row after row.
  template <class Activation>
  Rows(const Product& product,
       const Format& format,
       int dtype,
       int64_t count,
       int64_t in,
       Activation activation)
      : product_(product), count_(count), in_(in) {
    for (int64_t r = 0; r < count_; ++r) {
      const size_t bytes = static_cast<size_t>(in_ * size_of(dtype));
      raw_.push_back(std::make_unique<Guarded>(bytes, r % 2 ? Guarded::kBegin : Guarded::kEnd));
      for (int64_t i = 0; i < in_; ++i) {
        uint8_t* at = raw_.back()->data() + i * size_of(dtype);
        put(dtype, activation(i), at);
        values_.push_back(value_of(dtype, at));
      }
    }
    const int64_t bytes = product.prepared_bytes(format, in_, count_);
    usable_ = bytes % 64 == 0;
    prepared_ = std::make_unique<Guarded>(static_cast<size_t>(bytes));
    stride_ = count_ == 0 ? 0 : bytes / count_;
    std::vector<const void*> raw;
    for (const auto& row : raw_) {
      raw.push_back(row->data());
    }
    usable_ = usable_ && product.prepare(format, dtype, raw.data(), count_, in_, prepared_->data());
  }

  // Prepared, and in memory as large as was promised.
  bool usable() const { return usable_; }
  double value(int64_t row, int64_t i) const { return values_[static_cast<size_t>(row * in_ + i)]; }

  void multiply(const Matrix& w,
                int64_t begin,
                int64_t end,
                int64_t first,
                int64_t count,
                float* y,
                int64_t ldy) const {
    // What is ahead exists, but nothing but its address may matter.
    const Ahead ahead = {w.weight, w.out * w.row_bytes, w.scales, w.biases};
    if (!product_.by_row) {
      const void* pack = prepared_->data();
      product_.multiply(w, begin, end, &pack, count_, y, ldy, ahead);
      return;
    }
    std::vector<const void*> rows;
    for (int64_t r = first; r < first + count; ++r) {
      rows.push_back(prepared_->data() + r * stride_);
    }
    product_.multiply(w, begin, end, rows.data(), count, y, ldy, ahead);
  }

 private:
  const Product& product_;
  int64_t count_, in_;
  bool usable_;
  int64_t stride_;
  std::vector<std::unique_ptr<Guarded>> raw_;
  std::vector<double> values_;
  std::unique_ptr<Guarded> prepared_;
};

// A result matrix with columns that nobody may write.
class Result {
 public:
  Result(int64_t count, int64_t columns)
      : count_(count),
        columns_(columns),
        values_(static_cast<size_t>(count * (columns + kSpare)), kUntouched) {}

  float* data() { return values_.data(); }
  int64_t stride() const { return columns_ + kSpare; }
  float at(int64_t row, int64_t column) const {
    return values_[static_cast<size_t>(row * stride() + column)];
  }
  bool tidy() const {
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t i = columns_; i < stride(); ++i) {
        if (at(r, i) != kUntouched) {
          return false;
        }
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kSpare = 3;
  static constexpr float kUntouched = 12345.0f;
  int64_t count_, columns_;
  std::vector<float> values_;
};

}  // namespace moefast::testing

#endif
