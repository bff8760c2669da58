// moefast_attention: checks, and the pieces that the threads take.
//
// Rows: the queries of all query heads that read one key head, by position, then head: `group` rows
// a position. How rows and keys are cut into pieces follows from the shapes alone, and what pieces
// leave is put together in the order of the keys: results do not depend on the number of threads.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "engine.h"
#include "heads.h"

namespace moefast {
namespace {

// Rows that go over packed keys together: what a core's own cache holds beside a tile of keys.
constexpr int64_t kRowsPerPiece = 96;
// Up to so many positions, or rows, are done sooner without packing.
constexpr int64_t kFewPositions = 4;
constexpr int64_t kFewRows = 16;
// Bytes of packed keys and values held at once, where one head does not take more.
constexpr int64_t kPackedBytes = 32 << 20;

constexpr float kNone = -std::numeric_limits<float>::infinity();

class Run {
 public:
  Run(moefast_engine& engine,
      const moefast_heads& queries,
      const moefast_heads& keys,
      const moefast_heads& values,
      float scale,
      bool causal,
      void* out,
      int dtype)
      : engine_(engine),
        isa_(engine.isa),
        q_(queries),
        k_(keys),
        v_(values),
        scale_(scale),
        causal_(causal),
        out_(static_cast<uint8_t*>(out)),
        dtype_(dtype),
        group_(queries.heads / keys.heads),
        rows_(queries.length * group_),
        heads_(keys.batch * keys.heads),
        query_stride_(round_up(queries.dims, 16)),
        sum_stride_(round_up(values.dims, 16)) {}

  void operator()() {
    if (q_.length <= kFewPositions || rows_ <= kFewRows) {
      direct();
    } else {
      packed();
    }
  }

 private:
  // Floats that the sums of `rows` rows take, and their memory laid out.
  int64_t state_size(int64_t rows) const { return round_up(rows, 16) * (2 + sum_stride_); }

  static void lay_out_state(float* memory, AttentionRows& rows) {
    const int64_t padded = round_up(rows.count, 16);
    rows.largest = memory;
    rows.total = memory + padded;
    rows.sums = memory + 2 * padded;
  }

  // Likewise of what a thread works with.
  int64_t work_size(int64_t rows, int64_t keys) const {
    return round_up(rows, 16) * (query_stride_ + keys + 1 + 2);
  }

  AttentionRows lay_out(int64_t count, int64_t keys, float* work, float* state) const {
    const int64_t padded = round_up(count, 16);
    AttentionRows rows{};
    rows.count = count;
    rows.dims = q_.dims;
    rows.value_dims = v_.dims;
    rows.query_stride = query_stride_;
    rows.sum_stride = sum_stride_;
    rows.scale = scale_;
    rows.queries = work;
    rows.scores = work + padded * query_stride_;
    rows.factors = rows.scores + padded * keys;
    rows.seen = reinterpret_cast<int64_t*>(rows.factors + padded);
    lay_out_state(state, rows);
    return rows;
  }

  int64_t seen_by(int64_t row) const {
    return causal_ ? row / group_ + 1 + k_.length - q_.length : k_.length;
  }

  // Rows [begin, begin + rows.count) of a key head, with nothing summed up.
  void load(int64_t head, int64_t begin, const AttentionRows& rows) const {
    auto* queries = const_cast<float*>(rows.queries);
    auto* seen = const_cast<int64_t*>(rows.seen);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t position = (begin + r) / group_, within = (begin + r) % group_;
      const uint8_t* from =
          row_of(q_, head / k_.heads, head % k_.heads * group_ + within, position);
      float* to = queries + r * query_stride_;
      isa_.widen(q_.dtype, from, q_.dims, to);
      std::fill(to + q_.dims, to + query_stride_, 0.0f);
      seen[r] = seen_by(begin + r);
    }
    const int64_t padded = round_up(rows.count, 16);
    std::fill_n(rows.largest, padded, kNone);
    std::fill_n(rows.total, padded, 0.0f);
    std::fill_n(rows.sums, rows.count * sum_stride_, 0.0f);
  }

  void store(int64_t head, int64_t begin, const AttentionRows& rows) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t position = (begin + r) / group_, within = (begin + r) % group_;
      const int64_t batch = head / k_.heads, of_query = head % k_.heads * group_ + within;
      float* sums = rows.sums + r * sum_stride_;
      const float inverse = 1.0f / rows.total[r];
      for (int64_t i = 0; i < v_.dims; ++i) {
        sums[i] *= inverse;
      }
      const int64_t at = ((batch * q_.length + position) * q_.heads + of_query) * v_.dims;
      isa_.narrow(dtype_, sums, v_.dims, out_ + at * size_of(dtype_));
    }
  }

  AttentionKeys keys_of(int64_t head, int64_t first, int64_t count) const {
    const int64_t batch = head / k_.heads, within = head % k_.heads;
    return {row_of(k_, batch, within, first),
            row_of(v_, batch, within, first),
            k_.row_stride * size_of(k_.dtype),
            v_.row_stride * size_of(v_.dtype),
            count,
            k_.dtype,
            v_.dtype};
  }

  // Few rows: each piece takes a chunk of keys, for all rows of its head.
  void direct() {
    const int64_t chunks = (k_.length + kAttentionChunk - 1) / kAttentionChunk;
    const int64_t work_size = this->work_size(rows_, kAttentionChunk);
    const int64_t state_size = this->state_size(rows_);
    const int64_t threads = engine_.pool.threads();
    auto* work = engine_.scratch.take<float>(threads * work_size);
    auto* states = engine_.scratch.take<float>(heads_ * chunks * state_size);
    engine_.pool.run(heads_ * chunks, [&](int64_t item, int64_t, int thread) {
      const int64_t head = item / chunks, first = item % chunks * kAttentionChunk;
      const AttentionRows rows =
          lay_out(rows_, kAttentionChunk, work + thread * work_size, states + item * state_size);
      load(head, 0, rows);
      const int64_t count = std::min(kAttentionChunk, seen_by(rows_ - 1) - first);
      isa_.attention->direct(rows, keys_of(head, first, count), first);
      if (chunks == 1) {
        store(head, 0, rows);
      }
    });
    if (chunks > 1) {
      engine_.pool.run(heads_, [&](int64_t head, int64_t, int) {
        merge(head, states + head * chunks * state_size, chunks);
      });
    }
  }

  // All chunks of a head into the first of them.
  void merge(int64_t head, float* states, int64_t chunks) const {
    const int64_t size = state_size(rows_);
    AttentionRows rows{};
    rows.count = rows_;
    lay_out_state(states, rows);
    for (int64_t r = 0; r < rows_; ++r) {
      float largest = kNone;
      for (int64_t c = 0; c < chunks; ++c) {
        largest = std::max(largest, rows.largest[c * size + r]);
      }
      const float base = largest == kNone ? 0.0f : largest;
      float* sums = rows.sums + r * sum_stride_;
      float total = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const float factor = std::exp(rows.largest[c * size + r] - base);
        total += factor * rows.total[c * size + r];
        if (c == 0) {
          std::for_each(sums, sums + v_.dims, [=](float& sum) { sum *= factor; });
        } else {
          isa_.add_scaled(factor, sums + c * size, v_.dims, sums);
        }
      }
      rows.total[r] = total;
    }
    store(head, 0, rows);
  }

  // Many rows: keys and values are packed first, once for all pieces of rows.
  void packed() {
    const int64_t tiles = (k_.length + kAttentionTile - 1) / kAttentionTile;
    const int64_t key_size = kAttentionTile * q_.dims;
    const int64_t tile_size = round_up(key_size + kAttentionTile * sum_stride_, 16);
    const int64_t most = std::max<int64_t>(1, kPackedBytes / 4 / (tiles * tile_size));
    const int64_t step = std::min(heads_, most);
    const int64_t pieces = (rows_ + kRowsPerPiece - 1) / kRowsPerPiece;
    const int64_t most_rows = std::min(rows_, kRowsPerPiece);
    const int64_t work_size = this->work_size(most_rows, kAttentionTile);
    const int64_t thread_size = work_size + state_size(most_rows);
    auto* tile = engine_.scratch.take<float>(step * tiles * tile_size);
    auto* finite = engine_.scratch.take<bool>(step * tiles);
    auto* work = engine_.scratch.take<float>(engine_.pool.threads() * thread_size);

    for (int64_t done = 0; done < heads_; done += step) {
      const int64_t heads = std::min(step, heads_ - done);
      engine_.pool.run(heads * tiles, [&](int64_t item, int64_t, int) {
        const int64_t first = item % tiles * kAttentionTile;
        const int64_t count = std::min(kAttentionTile, k_.length - first);
        float* to = tile + item * tile_size;
        finite[item] = isa_.attention->pack(keys_of(done + item / tiles, first, count), q_.dims,
                                            v_.dims, to, to + key_size);
      });
      engine_.pool.run(heads * pieces, [&](int64_t item, int64_t, int thread) {
        // The last rows see most: the longest pieces first.
        const int64_t head = item % heads;
        const int64_t begin = (pieces - 1 - item / heads) * kRowsPerPiece;
        float* memory = work + thread * thread_size;
        const AttentionRows rows = lay_out(std::min(kRowsPerPiece, rows_ - begin), kAttentionTile,
                                           memory, memory + work_size);
        load(done + head, begin, rows);
        const int64_t seen = seen_by(begin + rows.count - 1);
        for (int64_t first = 0; first < seen; first += kAttentionTile) {
          const int64_t at = head * tiles + first / kAttentionTile;
          const float* keys = tile + at * tile_size;
          isa_.attention->packed(rows, keys, keys + key_size, first,
                                 std::min(kAttentionTile, seen - first), finite[at]);
        }
        store(done + head, begin, rows);
      });
    }
  }

  moefast_engine& engine_;
  const Isa& isa_;
  const moefast_heads q_, k_, v_;
  const float scale_;
  const bool causal_;
  uint8_t* const out_;
  const int dtype_;
  const int64_t group_;  // query heads that read one key head
  const int64_t rows_;   // of one key head
  const int64_t heads_;  // key heads of all batches
  const int64_t query_stride_;
  const int64_t sum_stride_;
};

void check_equal(const char* name, int64_t value, const char* other, int64_t wanted) {
  if (value != wanted) {
    refuse("%s must equal %s=%" PRId64 ", got %" PRId64 ".", name, other, wanted, value);
  }
}

void check(const moefast_heads& q, const moefast_heads& k, const moefast_heads& v, bool causal) {
  check_heads("queries", q);
  check_heads("keys", k);
  check_heads("values", v);
  check_equal("keys.batch", k.batch, "queries.batch", q.batch);
  check_equal("values.batch", v.batch, "queries.batch", q.batch);
  check_equal("keys.dims", k.dims, "queries.dims", q.dims);
  check_equal("values.heads", v.heads, "keys.heads", k.heads);
  check_equal("values.length", v.length, "keys.length", k.length);
  if (q.heads % k.heads != 0) {
    refuse("queries.heads must be a multiple of keys.heads=%" PRId64 ", got %" PRId64 ".", k.heads,
           q.heads);
  }
  if (k.length < 1) {
    refuse("keys.length must be at least 1, got %" PRId64 ".", k.length);
  }
  if (causal && k.length < q.length) {
    refuse("keys.length must be at least queries.length=%" PRId64 " where causal, got %" PRId64 ".",
           q.length, k.length);
  }
}

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_attention(moefast_engine* engine,
                                 const moefast_heads* queries,
                                 const moefast_heads* keys,
                                 const moefast_heads* values,
                                 float scale,
                                 int32_t causal,
                                 void* out,
                                 int32_t out_dtype) {
  return run_on(engine, "attention", [&](moefast_engine& on) {
    check_pointer("queries", queries);
    check_pointer("keys", keys);
    check_pointer("values", values);
    check_dtype("out", out_dtype);
    check(*queries, *keys, *values, causal != 0);
    if (queries->batch == 0 || queries->length == 0) {
      return;
    }
    check_pointer("out", out);
    Run(on, *queries, *keys, *values, scale, causal != 0, out, out_dtype)();
  });
}
