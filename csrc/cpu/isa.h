// What an instruction set offers: elementwise helpers and products of rows with a weight.
//
// Everything above (experts.cpp, matmul.cpp) is ordinary C++ that any CPU runs; everything below is
// compiled once per instruction set, in a namespace of its own, and reached through the table `Isa`
// only.
#ifndef MOEFAST_CPU_ISA_H
#define MOEFAST_CPU_ISA_H

#include "types.h"

namespace moefast {

// How exact a product has to be, set by the dtype its result is rounded to.
enum Precision {
  kAnyValues,  // float32 arithmetic throughout: for rows that nothing else takes
  kFloat32,    // at least the error of float32 arithmetic
  kFloat16,    // at least the error of float32 arithmetic on inputs kept to 15 bits per group
  kBfloat16,   // as kFloat16; activations and weights may also be rounded to bfloat16
};

// Where the kernel of the next piece of work will read, so that the end of this one can fetch it.
struct Ahead {
  const uint8_t* weight;  // NULL: nowhere
  int64_t bytes;
  const uint8_t* scales;  // NULL where there are none
  const uint8_t* biases;
};

// A way to multiply prepared rows of activations with rows of a weight.
struct Product {
  const char* name;
  // Products of equal layout read each other's prepared rows (of the same group size and length).
  int layout;
  // True: rows are prepared one by one and may be multiplied in any selection.
  // False: all rows of a product are packed together; rows[0] of multiply is then the address of
  // the pack, and there are no others.
  bool by_row;

  // Bytes that `count` prepared rows of `in` values take: a multiple of 64, and for by_row products
  // proportional to count.
  int64_t (*prepared_bytes)(const Format& format, int64_t in, int64_t count);

  // Prepares rows[0..count) (pointers to `in` values of `dtype`) at `prepared` (64-byte aligned).
  // False: a value is infinite, NaN, or too small or large for this way; the rows must go another
  // way.
  bool (*prepare)(const Format& format,
                  int dtype,
                  const void* const* rows,
                  int64_t count,
                  int64_t in,
                  void* prepared);

  // y[r * ldy + n - begin] = factor * sum_i W[n, i] x_r[i] for begin <= n < end, 0 <= r < count.
  // Reads each of these rows of W from memory once, whatever count is, as long as they fit into a
  // cache.
  void (*multiply)(const Matrix& w,
                   int64_t begin,
                   int64_t end,
                   const void* const* rows,
                   int64_t count,
                   float* y,
                   int64_t ldy,
                   const Ahead& ahead);
};

// Keys that are packed together, and keys that few rows of queries take in one piece.
constexpr int64_t kAttentionTile = 64;
constexpr int64_t kAttentionChunk = 256;

// Keys and values of one head where they lie: `count` rows of each, strides in bytes.
struct AttentionKeys {
  const uint8_t* keys;
  const uint8_t* values;
  int64_t key_stride;
  int64_t value_stride;
  int64_t count;
  int key_dtype;
  int value_dtype;
};

// Rows of queries that share a head's keys, and what attention has added up for them so far. Arrays
// of one number per row are padded to a multiple of 16, strides are multiples of 16 values.
struct AttentionRows {
  int64_t count;
  int64_t dims;
  int64_t value_dims;
  const float* queries;  // [count, query_stride], zeros behind dims
  int64_t query_stride;
  const int64_t* seen;  // how many of the head's keys each row sees, ascending
  float scale;
  float* scores;   // [count, kAttentionTile or kAttentionChunk], scratch
  float* factors;  // [count], scratch
  float* largest;  // [count] scores; -inf to begin with
  float* total;    // [count] weights exp(score - largest) summed up; 0 to begin with
  float* sums;     // [count, sum_stride] values times weights; 0 to begin with
  int64_t sum_stride;
};

struct Attention {
  // Widens up to kAttentionTile keys into keys [dims, kAttentionTile], transposed, and their values
  // into [count, value_dims rounded up to 16]. The result: whether the values are all finite.
  bool (*pack)(
      const AttentionKeys& from, int64_t dims, int64_t value_dims, float* keys, float* values);
  // Adds `count` packed keys, the first of which is the head's key number `first`.
  void (*packed)(const AttentionRows& rows,
                 const float* keys,
                 const float* values,
                 int64_t first,
                 int64_t count,
                 bool finite);
  // Adds up to kAttentionChunk keys, reading them once: for a few rows.
  void (*direct)(const AttentionRows& rows, const AttentionKeys& from, int64_t first);
};

// Values summed up as exponentials: sum = sum exp(x - largest), or sum exp(x) where the largest is
// not finite. NaN is in the sum only.
struct SumExp {
  float largest;
  float sum;
};

struct Isa {
  const char* name;

  // The product for a format, or NULL where this instruction set has nothing better than the next
  // in line (see `base`). `count`: rows that will be multiplied with one weight. Portable never
  // returns NULL.
  const Product* (*product)(const Format& format, Precision precision, int64_t in, int64_t count);

  // float32 <- dtype, and back with round to nearest even.
  void (*widen)(int dtype, const void* from, int64_t count, float* to);
  void (*narrow)(int dtype, const float* from, int64_t count, void* to);
  // up[i] = activation(gate[i], up[i]); gate is NULL where the activation has none.
  void (*activate)(const moefast_activation& activation,
                   const float* gate,
                   float* up,
                   int64_t count);
  // y[i] += a * x[i]
  void (*add_scaled)(float a, const float* x, int64_t count, float* y);
  SumExp (*sum_exp)(const float* x, int64_t count);

  const Attention* attention;

  // For measurements: reads `bytes` at `from` once; runs `rounds` of the fastest multiply-adds and
  // returns the number of floating point operations done.
  uint64_t (*read)(const void* from, size_t bytes);
  double (*flops)(int64_t rounds);

  // The instruction set that does what this one leaves out, or NULL.
  const Isa* base;
};

// One per file isa_*.cpp; NULL where the compiler cannot build it. Call only where `supported` says
// so.
const Isa* isa_portable();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_amx();
const Isa* isa_neon();

// isa.cpp: what this machine runs. find_isa("") is the best; NULL: unknown here.
const Isa* find_isa(const char* name);
size_t list_isas(const char** names, size_t capacity);

// Follows `base` until an instruction set has a product: never NULL.
const Product* find_product(
    const Isa& isa, const Format& format, Precision precision, int64_t in, int64_t count);

}  // namespace moefast

#endif
