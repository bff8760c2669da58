// moefast_matmul: the dense sibling of the expert operations.
#include <algorithm>

#include "check.h"
#include "chunks.h"
#include "dense.h"

namespace moefast {
namespace {

// Routes a chunk's tokens count for: of a dense product a token has one.
constexpr int64_t kRoutesPerToken = 8;

}  // namespace

void multiply_dense(moefast_engine& engine,
                    const Source& x,
                    const moefast_projection& weight,
                    void* out,
                    int dtype) {
  const Linear linear = linear_of(weight, 0);
  const Matrix& matrix = linear.matrix;
  auto* index = engine.scratch.take<int32_t>(x.count);
  for (int64_t i = 0; i < x.count; ++i) {
    index[i] = static_cast<int32_t>(i);
  }
  Operand operand{&matrix, index, x.count};
  prepare(engine, x, precision_of(dtype), &operand, 1);

  const int64_t step = std::min(rows_per_piece(matrix), round_up(matrix.out, 16));
  const int64_t size = round_up(x.count * step, 16);
  auto* products = engine.scratch.take<float>(engine.pool.threads() * size);
  const int64_t pieces = (matrix.out + step - 1) / step;
  engine.pool.run(pieces, [&](int64_t item, int64_t next, int thread) {
    const int64_t begin = item * step, end = std::min(matrix.out, begin + step);
    Ahead after{};
    if (next >= 0) {
      after = ahead_of(matrix, next * step, std::min(matrix.out, (next + 1) * step));
    }
    float* y = products + thread * size;
    operand.multiply(begin, end, y, end - begin, after);
    add_bias(engine.isa, linear, begin, end, x.count, y, end - begin);
    for (int64_t r = 0; r < x.count; ++r) {
      auto* to = static_cast<uint8_t*>(row_at(out, dtype, r, matrix.out)) + begin * size_of(dtype);
      engine.isa.narrow(dtype, y + r * (end - begin), end - begin, to);
    }
  });
}

}  // namespace moefast

using namespace moefast;

extern "C" int moefast_matmul(moefast_engine* engine,
                              const moefast_rows* x,
                              const moefast_projection* weight,
                              void* out,
                              int32_t out_dtype) {
  return run_on(engine, "quantized_matmul", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("weight", weight);
    check_rows("x", *x);
    check_dtype("out", out_dtype);
    check_projection("weight", *weight);
    if (weight->num_experts != 0) {
      refuse("weight must be dense, got a stack of %lld.",
             static_cast<long long>(weight->num_experts));
    }
    if (weight->in_dims != x->dims) {
      refuse("x.dims must equal in_dims=%lld, got %lld.", static_cast<long long>(weight->in_dims),
             static_cast<long long>(x->dims));
    }
    if (x->count > 0) {
      check_pointer("out", out);
    }
    each_chunk(on, *x, kRoutesPerToken, [&](const Source& rows, int64_t first) {
      multiply_dense(on, rows, *weight, row_at(out, out_dtype, first, weight->out_dims), out_dtype);
    });
  });
}
