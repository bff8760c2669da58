// moefast_matmul: the dense sibling of the expert operations.
#include <algorithm>
#include <vector>

#include "check.h"
#include "chunks.h"
#include "dense.h"

namespace moefast {
namespace {

// Routes a chunk's tokens count for: of a dense product a token has one.
constexpr int64_t kRoutesPerToken = 8;

// Rows [begin, end) of the weight of one of the products.
struct Piece {
  int64_t product;
  int64_t begin;
  int64_t end;
};

}  // namespace

void multiply_dense(moefast_engine& engine,
                    const Source& x,
                    const DenseProduct* products,
                    int64_t count,
                    int dtype) {
  auto* index = engine.scratch.take<int32_t>(x.count);
  for (int64_t i = 0; i < x.count; ++i) {
    index[i] = static_cast<int32_t>(i);
  }
  std::vector<Linear> linears;
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    linears.push_back(linear_of(*products[i].weight, 0));
    rows += linears.back().matrix.out;
  }
  std::vector<Operand> operands;
  std::vector<Piece> pieces;
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Matrix& matrix = linears[i].matrix;
    operands.push_back({&matrix, index, x.count});
    const int64_t some = rows_per_piece(matrix, rows, engine.pool.threads(), x.count);
    const int64_t step = std::min(some, round_up(matrix.out, 16));
    for (int64_t n = 0; n < matrix.out; n += step) {
      pieces.push_back({i, n, std::min(matrix.out, n + step)});
    }
    widest = std::max(widest, step);
  }
  prepare(engine, x, precision_of(dtype), operands.data(), count);

  const int64_t size = round_up(x.count * widest, 16);
  auto* sums = engine.scratch.take<float>(engine.pool.threads() * size);
  const auto all = static_cast<int64_t>(pieces.size());
  engine.pool.run(all, [&](int64_t item, int64_t next, int thread) {
    const auto [which, begin, end] = pieces[item];
    Ahead after{};
    if (next >= 0) {
      const Piece& later = pieces[next];
      after = ahead_of(linears[later.product].matrix, later.begin, later.end);
    }
    const Linear& linear = linears[which];
    float* y = sums + thread * size;
    operands[which].multiply(begin, end, y, end - begin, after);
    add_bias(engine.isa, linear, begin, end, x.count, y, end - begin);
    for (int64_t r = 0; r < x.count; ++r) {
      void* row = row_at(products[which].out, dtype, r, linear.matrix.out);
      engine.isa.narrow(dtype, y + r * (end - begin), end - begin,
                        static_cast<uint8_t*>(row) + begin * size_of(dtype));
    }
  });
}

}  // namespace moefast

using namespace moefast;

extern "C" int moefast_matmul(moefast_engine* engine,
                              const moefast_rows* x,
                              const moefast_projection* weights,
                              void* const* outs,
                              int64_t count,
                              int32_t out_dtype) {
  return run_on(engine, "quantized_matmul", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_pointer("weights", weights);
    check_pointer("outs", outs);
    check_rows("x", *x);
    check_dtype("out", out_dtype);
    for (int64_t i = 0; i < count; ++i) {
      const moefast_projection& weight = weights[i];
      check_projection("weight", weight);
      if (weight.num_experts != 0) {
        refuse("weight must be dense, got a stack of %lld.",
               static_cast<long long>(weight.num_experts));
      }
      if (weight.in_dims != x->dims) {
        refuse("x.dims must equal in_dims=%lld, got %lld.", static_cast<long long>(weight.in_dims),
               static_cast<long long>(x->dims));
      }
      if (x->count > 0) {
        check_pointer("out", outs[i]);
      }
    }
    each_chunk(on, *x, kRoutesPerToken, [&](const Source& rows, int64_t first) {
      std::vector<DenseProduct> products;
      for (int64_t i = 0; i < count; ++i) {
        products.push_back({weights + i, row_at(outs[i], out_dtype, first, weights[i].out_dims)});
      }
      multiply_dense(on, rows, products.data(), count, out_dtype);
    });
  });
}
