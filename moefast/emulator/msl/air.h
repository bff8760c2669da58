// The simdgroup operations of Apple's compiled kernels (air_intrinsics.py), as functions that take
// and give values through memory: that is the same in every calling convention. Compiled once,
// linked to each such kernel.
#include "msl.h"

MSL_RUNTIME void msl_call_from(size_t address);
// Lanes meet where the kernel calls, not here.
#define MSL_HERE msl_call_from((size_t)__builtin_return_address(0))

#define MSL_AIR_1(name, suffix, T, call)                                           \
  extern "C" __attribute__((convergent, noinline)) void msl_air_##name##_##suffix( \
      const thread T* a, thread T* out) {                                          \
    MSL_HERE;                                                                      \
    *out = call(*a);                                                               \
  }
#define MSL_AIR_LANE(name, suffix, T, call)                                        \
  extern "C" __attribute__((convergent, noinline)) void msl_air_##name##_##suffix( \
      const thread T* a, const thread ushort* n, thread T* out) {                  \
    MSL_HERE;                                                                      \
    *out = call(*a, *n);                                                           \
  }
#define MSL_AIR_FILL(name, suffix, T, call)                                        \
  extern "C" __attribute__((convergent, noinline)) void msl_air_##name##_##suffix( \
      const thread T* a, const thread T* fill, const thread ushort* n,             \
      const thread ushort* modulo, thread T* out) {                                \
    MSL_HERE;                                                                      \
    *out = call(*a, *fill, *n, *modulo);                                           \
  }

#define MSL_AIR_ARITHMETIC(suffix, T)                                                      \
  MSL_AIR_1(simd_sum, suffix, T, metal::msl_simd_sum)                                      \
  MSL_AIR_1(simd_product, suffix, T, metal::msl_simd_product)                              \
  MSL_AIR_1(simd_max, suffix, T, metal::msl_simd_max)                                      \
  MSL_AIR_1(simd_min, suffix, T, metal::msl_simd_min)                                      \
  MSL_AIR_1(quad_sum, suffix, T, metal::msl_quad_sum)                                      \
  MSL_AIR_1(quad_product, suffix, T, metal::msl_quad_product)                              \
  MSL_AIR_1(quad_max, suffix, T, metal::msl_quad_max)                                      \
  MSL_AIR_1(quad_min, suffix, T, metal::msl_quad_min)                                      \
  MSL_AIR_1(simd_prefix_inclusive_sum, suffix, T, metal::msl_sum_prefix_inclusive)         \
  MSL_AIR_1(simd_prefix_exclusive_sum, suffix, T, metal::msl_sum_prefix_exclusive)         \
  MSL_AIR_1(simd_prefix_inclusive_product, suffix, T, metal::msl_product_prefix_inclusive) \
  MSL_AIR_1(simd_prefix_exclusive_product, suffix, T, metal::msl_product_prefix_exclusive)
#define MSL_AIR_BITS(suffix, T)                       \
  MSL_AIR_1(simd_and, suffix, T, metal::msl_simd_and) \
  MSL_AIR_1(simd_or, suffix, T, metal::msl_simd_or)   \
  MSL_AIR_1(simd_xor, suffix, T, metal::msl_simd_xor)
#define MSL_AIR_MOVES(suffix, T)                                                         \
  MSL_AIR_1(simd_broadcast_first, suffix, T, metal::msl_simd_broadcast_first)            \
  MSL_AIR_LANE(simd_broadcast, suffix, T, metal::msl_simd_broadcast)                     \
  MSL_AIR_LANE(simd_shuffle, suffix, T, metal::msl_simd_shuffle)                         \
  MSL_AIR_LANE(simd_shuffle_down, suffix, T, metal::msl_simd_shuffle_down)               \
  MSL_AIR_LANE(simd_shuffle_up, suffix, T, metal::msl_simd_shuffle_up)                   \
  MSL_AIR_LANE(simd_shuffle_xor, suffix, T, metal::msl_simd_shuffle_xor)                 \
  MSL_AIR_LANE(simd_shuffle_rotate_down, suffix, T, metal::msl_simd_shuffle_rotate_down) \
  MSL_AIR_LANE(simd_shuffle_rotate_up, suffix, T, metal::msl_simd_shuffle_rotate_up)     \
  MSL_AIR_LANE(quad_shuffle, suffix, T, metal::msl_quad_shuffle)                         \
  MSL_AIR_LANE(quad_shuffle_xor, suffix, T, metal::msl_quad_shuffle_xor)                 \
  MSL_AIR_LANE(quad_shuffle_down, suffix, T, metal::msl_quad_shuffle_down)               \
  MSL_AIR_LANE(quad_shuffle_up, suffix, T, metal::msl_quad_shuffle_up)                   \
  MSL_AIR_FILL(simd_shuffle_and_fill_up, suffix, T, metal::msl_simd_shuffle_and_fill_up) \
  MSL_AIR_FILL(simd_shuffle_and_fill_down, suffix, T, metal::msl_simd_shuffle_and_fill_down)

#define MSL_AIR_ALL(X) \
  X(f32, float)        \
  X(f16, half)         \
  X(s_i32, int) X(u_i32, uint) X(s_i16, short) X(u_i16, ushort) X(s_i8, char) X(u_i8, uchar)
#define MSL_AIR_INTEGERS(X) \
  X(s_i32, int) X(u_i32, uint) X(s_i16, short) X(u_i16, ushort) X(s_i8, char) X(u_i8, uchar)
MSL_AIR_ALL(MSL_AIR_ARITHMETIC)
MSL_AIR_INTEGERS(MSL_AIR_BITS)
MSL_AIR_ALL(MSL_AIR_MOVES)
MSL_AIR_MOVES(u_v2i32, uint2)
MSL_AIR_MOVES(s_v2i32, int2)
MSL_AIR_MOVES(v2f32, float2)
MSL_AIR_MOVES(v4f32, float4)

extern "C" __attribute__((convergent, noinline)) void msl_air_simd_any(const thread uchar* yes,
                                                                       thread uchar* out) {
  MSL_HERE;
  *out = metal::simd_any(*yes);
}
extern "C" __attribute__((convergent, noinline)) void msl_air_simd_all(const thread uchar* yes,
                                                                       thread uchar* out) {
  MSL_HERE;
  *out = metal::simd_all(*yes);
}
extern "C" __attribute__((convergent, noinline)) void msl_air_simd_ballot(const thread uchar* yes,
                                                                          thread ulong* out) {
  MSL_HERE;
  *out = (ulong)metal::simd_ballot(*yes);
}

// Row and first column of what the lane holds of a matrix, which all lanes load or store.
extern "C" __attribute__((convergent, noinline)) void msl_air_matrix_place(thread uint2* out) {
  MSL_HERE;
  msl_meet(0u, msl_op_matrix_load);
  metal::msl_matrix_place at;
  (*out)[0] = at.row;
  (*out)[1] = at.column;
}
#define MSL_AIR_MATRIX(D, DT, A, AT, B, BT, C, CT)                                                \
  extern "C" __attribute__((convergent, noinline)) void msl_air_matrix_##D##_##A##_##B##_##C(     \
      const thread AT##2 * a, const thread BT##2 * b, const thread CT##2 * c, thread DT##2 * d) { \
    MSL_HERE;                                                                                     \
    metal::simdgroup_matrix<AT, 8, 8> left;                                                       \
    metal::simdgroup_matrix<BT, 8, 8> right;                                                      \
    metal::simdgroup_matrix<DT, 8, 8> product;                                                    \
    left.thread_elements() = *a;                                                                  \
    right.thread_elements() = *b;                                                                 \
    metal::msl_matrix_multiply(product, left, right, *c);                                         \
    *d = product.thread_elements();                                                               \
  }
#define MSL_AIR_MATRIX_OF(A, AT) MSL_AIR_MATRIX(f32, float, A, AT, A, AT, f32, float)
MSL_AIR_MATRIX_OF(f32, float)
MSL_AIR_MATRIX_OF(f16, half)
MSL_AIR_MATRIX_OF(bf16, bfloat)
MSL_AIR_MATRIX(f16, half, f16, half, f16, half, f16, half)
MSL_AIR_MATRIX(bf16, bfloat, bf16, bfloat, bf16, bfloat, bf16, bfloat)
