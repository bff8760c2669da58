#include "linear.h"

#include <algorithm>

namespace moefast {
namespace {

// What MLX divides a global scale by: the largest e4m3 value times the largest e2m1 value.
constexpr float kNvfp4Range = 448.0f * 6.0f;

// A row that is alone reads each weight once, from memory: longer without a break is faster.
// Several come back for the weights, which are still in the first cache then.
constexpr int64_t kAloneBytes = 64 << 10;
constexpr int64_t kSharedBytes = 32 << 10;
constexpr int64_t kPiecesPerThread = 8;

}  // namespace

Linear linear_of(const moefast_projection& p, int64_t expert) {
  Linear linear{};
  Matrix& m = linear.matrix;
  m.format = {p.mode, p.bits, p.group_size, p.dtype};
  m.out = p.out_dims;
  m.in = p.in_dims;
  m.factor = p.global_scale == nullptr ? 1.0f : p.global_scale[expert] / kNvfp4Range;
  const auto* weight = static_cast<const uint8_t*>(p.weight);
  if (p.mode == MOEFAST_PLAIN) {
    m.format.bits = 8 * static_cast<int>(size_of(p.dtype));
    m.format.group = 0;
    m.row_bytes = p.in_dims * size_of(p.dtype);
  } else {
    m.row_bytes = p.in_dims * p.bits / 8;
    m.scale_bytes = p.in_dims / p.group_size * (p.mode == MOEFAST_AFFINE ? size_of(p.dtype) : 1);
    m.scales = static_cast<const uint8_t*>(p.scales) + expert * p.out_dims * m.scale_bytes;
    if (p.biases != nullptr) {
      m.biases = static_cast<const uint8_t*>(p.biases) + expert * p.out_dims * m.scale_bytes;
    }
  }
  m.weight = weight + expert * p.out_dims * m.row_bytes;
  if (p.bias != nullptr) {
    linear.bias = static_cast<const uint8_t*>(p.bias) + expert * p.out_dims * size_of(p.bias_dtype);
    linear.bias_dtype = p.bias_dtype;
  }
  return linear;
}

void add_bias(const Isa& isa,
              const Linear& linear,
              int64_t begin,
              int64_t end,
              int64_t count,
              float* y,
              int64_t ldy) {
  if (linear.bias == nullptr) {
    return;
  }
  constexpr int64_t kStep = 256;
  float values[kStep];
  for (int64_t n = begin; n < end; n += kStep) {
    const int64_t size = std::min(kStep, end - n);
    isa.widen(linear.bias_dtype, linear.bias + n * size_of(linear.bias_dtype), size, values);
    for (int64_t r = 0; r < count; ++r) {
      isa.add_scaled(1.0f, values, size, y + r * ldy + n - begin);
    }
  }
}

int64_t rows_per_piece(const Matrix& w, int64_t rows, int threads, int64_t count) {
  constexpr int64_t kFewest = 16;
  const int64_t bytes = count == 1 ? kAloneBytes : kSharedBytes, most = count == 1 ? 256 : 128;
  const int64_t share = rows / (threads * kPiecesPerThread) / kFewest * kFewest;
  return std::clamp(std::min(round_up(bytes / w.row_bytes, kFewest), share), kFewest, most);
}

}  // namespace moefast
