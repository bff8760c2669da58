// Products of packed activations with a weight, in tiles.
//
// 32 rows of the weight are multiplied with all columns (16 rows of activations each) of the pack,
// up to 2048 values at a time. Two halves of 16 weight rows by two or three columns make four or
// six sums, which stay in tiles. While the first columns are multiplied with one block of 128
// values, the next block is dequantised: the tile unit and the vector units work at the same time.
// Other columns find the weights ready in the panel.
#ifndef MOEFAST_CPU_AMX_PRODUCT_H
#define MOEFAST_CPU_AMX_PRODUCT_H

#include "../isa.h"
#include "tiles.h"
#include "weights.h"

namespace moefast {
namespace {

// Columns whose sums are held at once.
constexpr int64_t kMostColumns = 32;

// Sums of 2 x 16 rows of the weight with one column: [half][16 weight rows][16 activation rows]
// float32.
constexpr int64_t kSumsSize = 512;

// How a few columns are multiplied with both halves. `one` is the step of one tile of values: `a`
// is the first half's tile of weights, `b` the first column's of activations.

// A single column has few sums to work on, and each takes its time: two of each, for even and odd
// tiles.
struct OneColumn {
  static constexpr int kColumns = 1;

  static inline void zero() {
    tile_zero0();
    tile_zero1();
    tile_zero2();
    tile_zero3();
  }
  static inline void load(const float* sums) {
    tile_load0(sums, 64);
    tile_load1(sums + 256, 64);
    tile_load2(sums + 512, 64);
    tile_load3(sums + 768, 64);
  }
  static inline void store(float* sums) {
    tile_store0(sums, 64);
    tile_store1(sums + 256, 64);
    tile_store2(sums + 512, 64);
    tile_store3(sums + 768, 64);
  }
  template <class Between>
  static inline void step(const uint16_t* a, const uint16_t* b, int64_t, int t, Between between) {
    if (t % 2 == 0) {
      tile_load6(b, 64);
      tile_load4(a, 64);
      MOEFAST_TILE_PRODUCT(0, 4, 6);
      between(0, 4);
      tile_load5(a + kHalf, 64);
      MOEFAST_TILE_PRODUCT(1, 5, 6);
      between(4, 4);
    } else {
      tile_load7(b, 64);
      tile_load4(a, 64);
      MOEFAST_TILE_PRODUCT(2, 4, 7);
      between(0, 4);
      tile_load5(a + kHalf, 64);
      MOEFAST_TILE_PRODUCT(3, 5, 7);
      between(4, 4);
    }
  }
};

struct TwoColumns {
  static constexpr int kColumns = 2;

  static inline void zero() { OneColumn::zero(); }
  static inline void load(const float* sums) { OneColumn::load(sums); }
  static inline void store(float* sums) { OneColumn::store(sums); }
  template <class Between>
  static inline void step(
      const uint16_t* a, const uint16_t* b, int64_t column, int, Between between) {
    tile_load4(a, 64);
    tile_load6(b, 64);
    MOEFAST_TILE_PRODUCT(0, 4, 6);
    between(0, 2);
    tile_load5(a + kHalf, 64);
    MOEFAST_TILE_PRODUCT(1, 5, 6);
    between(2, 2);
    tile_load7(b + column, 64);
    MOEFAST_TILE_PRODUCT(2, 4, 7);
    between(4, 2);
    MOEFAST_TILE_PRODUCT(3, 5, 7);
    between(6, 2);
  }
};

struct ThreeColumns {
  static constexpr int kColumns = 3;

  static inline void zero() {
    OneColumn::zero();
    tile_zero4();
    tile_zero5();
  }
  static inline void load(const float* sums) {
    OneColumn::load(sums);
    tile_load4(sums + 1024, 64);
    tile_load5(sums + 1280, 64);
  }
  static inline void store(float* sums) {
    OneColumn::store(sums);
    tile_store4(sums + 1024, 64);
    tile_store5(sums + 1280, 64);
  }
  template <class Between>
  static inline void step(
      const uint16_t* a, const uint16_t* b, int64_t column, int, Between between) {
    tile_load6(a, 64);
    tile_load7(b, 64);
    MOEFAST_TILE_PRODUCT(0, 6, 7);
    between(0, 1);
    tile_load7(b + column, 64);
    MOEFAST_TILE_PRODUCT(2, 6, 7);
    between(1, 1);
    tile_load7(b + 2 * column, 64);
    MOEFAST_TILE_PRODUCT(4, 6, 7);
    between(2, 2);
    tile_load6(a + kHalf, 64);
    MOEFAST_TILE_PRODUCT(5, 6, 7);
    between(4, 1);
    tile_load7(b + column, 64);
    MOEFAST_TILE_PRODUCT(3, 6, 7);
    between(5, 1);
    tile_load7(b, 64);
    MOEFAST_TILE_PRODUCT(1, 6, 7);
    between(6, 2);
  }
};

// y[r * ldy + n] = factor * sums[n][r] for `rows` activation rows and `size` <= 32 weight rows.
static inline void give_sums(
    const float* sums, int64_t rows, int64_t size, float factor, float* y, int64_t ldy) {
  for (int64_t half = 0; half * 16 < size; ++half) {
    __m512i values[16];
    for (int n = 0; n < 16; ++n) {
      values[n] = _mm512_load_si512(sums + half * 256 + n * 16);
    }
    transpose16(values);
    const __mmask16 some = first_of_16(size - half * 16);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(values[r]), _mm512_set1_ps(factor));
      _mm512_mask_storeu_ps(y + r * ldy + half * 16, some, scaled);
    }
  }
}

template <class Weights>
struct Tiled {
  static int64_t prepared_bytes(const Format&, int64_t in, int64_t count) {
    return pack_bytes(in, count);
  }

  static bool prepare(const Format&,
                      int dtype,
                      const void* const* rows,
                      int64_t count,
                      int64_t in,
                      void* prepared) {
    return pack_rows(Weights::kOrder, dtype, rows, count, in, prepared);
  }

  // `blocks` blocks of the panel by the columns of `Columns`. kFill: the panel's first block is
  // there, the others are made on the way.
  template <class Columns, bool kFill>
  static inline void multiply_panel(const Filler<Weights>& filler,
                                    const Panel& panel,
                                    const uint16_t* pack,
                                    int64_t column,
                                    int64_t blocks,
                                    bool fresh,
                                    float* sums) {
    if (fresh) {
      Columns::zero();
    } else {
      Columns::load(sums);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const uint16_t* a = panel.block(b);
      const uint16_t* x = pack + b / 2 * (2 * kPage) + b % 2 * kHalfPage;
      for (int t = 0; t < 4; ++t) {
        if (kFill && filler.whole(b + 1)) {
          Columns::step(
              a + tile_in_block(t), x + tile_in_block(t), column, t,
              [&](int first, int count) { filler.fill_rows(b + 1, 8 * t + first, count); });
        } else {
          Columns::step(a + tile_in_block(t), x + tile_in_block(t), column, t, [](int, int) {});
          if (kFill && b + 1 < blocks) {
            filler.fill(b + 1, 8 * t);
          }
        }
      }
    }
    Columns::store(sums);
  }

  template <bool kFill>
  static inline int64_t some_columns(const Filler<Weights>& filler,
                                     const Panel& panel,
                                     const uint16_t* pack,
                                     int64_t column,
                                     int64_t blocks,
                                     bool fresh,
                                     int64_t left,
                                     float* sums) {
    if (left == 1) {
      multiply_panel<OneColumn, kFill>(filler, panel, pack, column, blocks, fresh, sums);
      return 1;
    }
    if (left == 2 || left == 4) {  // not three and one
      multiply_panel<TwoColumns, kFill>(filler, panel, pack, column, blocks, fresh, sums);
      return 2;
    }
    multiply_panel<ThreeColumns, kFill>(filler, panel, pack, column, blocks, fresh, sums);
    return 3;
  }

  // Rows [row, row + 32) of the weight, up to `end`, times `count` columns of the pack.
  static inline void rows32(const Matrix& w,
                            int64_t row,
                            int64_t end,
                            const uint16_t* pack,
                            int64_t count,
                            const Ahead& ahead,
                            float* sums) {
    alignas(kPageBytes) uint16_t memory[kPanelSize];
    const Panel panel{memory, count <= 3 ? 1 : ~int64_t{0}};
    const int64_t column = column_size(w.in);
    for (int64_t from = 0; from < w.in; from += kPanelValues) {
      const int64_t values = w.in - from < kPanelValues ? w.in - from : kPanelValues;
      const int64_t blocks = tile_blocks(values);
      const Filler<Weights> filler(w, row, end, from, values, ahead, panel);
      for (int64_t first = 0; first < 32; first += 8) {
        filler.fill(0, first);
      }
      const uint16_t* x = pack + column_size(from);
      int64_t c = some_columns<true>(filler, panel, x, column, blocks, from == 0, count, sums);
      while (c < count) {
        c += some_columns<false>(filler, panel, x + c * column, column, blocks, from == 0,
                                 count - c, sums + c * kSumsSize);
      }
    }
    if (count == 1) {
      for (int64_t i = 0; i < kSumsSize; i += 16) {
        _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i),
                                                _mm512_load_ps(sums + kSumsSize + i)));
      }
    }
  }

  static void multiply(const Matrix& w,
                       int64_t begin,
                       int64_t end,
                       const void* const* rows,
                       int64_t count,
                       float* y,
                       int64_t ldy,
                       const Ahead& ahead) {
    if (count == 0) {
      return;
    }
    const Tiles tiles;
    alignas(64) float sums[kMostColumns * kSumsSize];
    const uint16_t* pack = page_from(rows[0]);
    const int64_t columns = round_up(count, 16) / 16;
    const int64_t column = column_size(w.in);
    for (int64_t n = begin; n < end; n += 32) {
      for (int64_t c = 0; c < columns; c += kMostColumns) {
        const int64_t here = columns - c < kMostColumns ? columns - c : kMostColumns;
        rows32(w, n, end, pack + c * column, here, ahead, sums);
        for (int64_t i = 0; i < here; ++i) {
          const int64_t r = (c + i) * 16;
          give_sums(sums + i * kSumsSize, count - r < 16 ? count - r : 16,
                    end - n < 32 ? end - n : 32, w.factor, y + r * ldy + n - begin, ldy);
        }
      }
    }
  }
};

}  // namespace
}  // namespace moefast

#endif
