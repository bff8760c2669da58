// moefast_embed: rows of a weight, such as the embeddings of tokens.
#include <algorithm>
#include <cinttypes>

#include "check.h"
#include "chunks.h"
#include "engine.h"
#include "generic/unpack.h"
#include "linear.h"

namespace moefast {
namespace {

// Values that one piece of work takes, about.
constexpr int64_t kPieceValues = 16 << 10;

template <class Values>
void unpack_row(const Isa& isa, const Matrix& w, int64_t row, uint8_t* out, int dtype) {
  const uint8_t* codes = w.weight + row * w.row_bytes;
  Scales scales;
  alignas(64) float chunk[kChunk];
  for (int64_t from = 0; from < w.in; from += kChunk) {
    if (from % Scales::kValues == 0) {
      load_scales(w, row, from, std::min<int64_t>(Scales::kValues, w.in - from), scales);
    }
    const int count = static_cast<int>(std::min<int64_t>(kChunk, w.in - from));
    const float* values = Values::read(w.format, codes, from, count, scales, chunk);
    if (w.factor != 1.0f) {
      for (int i = 0; i < count; ++i) {
        chunk[i] = w.factor * values[i];
      }
      values = chunk;
    }
    isa.narrow(dtype, values, count, out + from * size_of(dtype));
  }
}

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_embed(moefast_engine* engine,
                             const moefast_projection* weight,
                             const int32_t* indices,
                             int64_t count,
                             void* out,
                             int32_t out_dtype) {
  return run_on(engine, "embed", [&](moefast_engine& on) {
    check_pointer("weight", weight);
    check_projection("weight", *weight);
    check_dtype("out", out_dtype);
    if (weight->mode == MOEFAST_PLAIN || weight->num_experts != 0 || weight->bias != nullptr) {
      refuse("weight must be quantized, dense and without bias, got mode %" PRId32
             ", a stack of %" PRId64 " and bias %p.",
             weight->mode, weight->num_experts, weight->bias);
    }
    if (count < 0) {
      refuse("count must not be negative, got %" PRId64 ".", count);
    }
    if (count == 0) {
      return;
    }
    check_pointer("indices", indices);
    check_pointer("out", out);
    check_indices(indices, count, weight->out_dims);
    const Matrix matrix = linear_of(*weight, 0).matrix;
    const int64_t step = std::max<int64_t>(1, kPieceValues / matrix.in);
    on.pool.run((count + step - 1) / step, [&](int64_t item, int64_t, int) {
      const int64_t end = std::min(count, (item + 1) * step);
      with_values(matrix.format, [&](auto values) {
        for (int64_t i = item * step; i < end; ++i) {
          auto* row = static_cast<uint8_t*>(row_at(out, out_dtype, i, matrix.in));
          unpack_row<decltype(values)>(on.isa, matrix, indices[i], row, out_dtype);
        }
      });
    });
  });
}
