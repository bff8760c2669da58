// 8x8 matrices spread over a simdgroup: each lane holds two neighbouring elements of a row, as on
// Apple GPUs.
namespace metal {

// Row and first column of the two elements of a lane.
struct msl_matrix_place {
  uint row, column;
  msl_matrix_place() {
    uint lane = msl_lane(), quad = lane / 4;
    row = (quad & 4) + (lane / 2) % 4;
    column = (quad & 2) * 2 + (lane % 2) * 2;
  }
};
// The lane that holds an element.
MSL_INLINE uint msl_matrix_lane(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + ((column >> 1) & 1);
}

template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>,
                "the elements of a simdgroup matrix are half, bfloat or float");
  typedef vec<T, 2> storage_type;
  storage_type msl_elements;
  simdgroup_matrix() {}
  // T on the diagonal.
  explicit simdgroup_matrix(T diagonal) {
    msl_matrix_place at;
    msl_elements[0] = at.row == at.column ? diagonal : (T)0;
    msl_elements[1] = at.row == at.column + 1 ? diagonal : (T)0;
  }
  thread storage_type& thread_elements() thread { return msl_elements; }
  const thread storage_type& thread_elements() const thread { return msl_elements; }
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <typename T, int R, int C = R>
MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.msl_elements = value;
  return m;
}
template <typename T, int R, int C = R>
MSL_INLINE simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, R, C>(value);
}

#define MSL_MATRIX_MEMORY(SPACE)                                                                   \
  template <typename T, int R, int C>                                                              \
  MSL_INLINE void simdgroup_load(thread simdgroup_matrix<T, R, C>& m, const SPACE T* from,         \
                                 ulong elements_per_row = C, ulong2 origin = 0,                    \
                                 bool transpose = false) {                                         \
    msl_meet(0u, msl_op_matrix_load);                                                              \
    msl_matrix_place at;                                                                           \
    for (uint k = 0; k < 2; k++) {                                                                 \
      ulong row = transpose ? at.column + k : at.row, column = transpose ? at.row : at.column + k; \
      m.msl_elements[k] = from[(row + origin.y) * elements_per_row + column + origin.x];           \
    }                                                                                              \
  }                                                                                                \
  template <typename T, int R, int C>                                                              \
  MSL_INLINE void simdgroup_store(simdgroup_matrix<T, R, C> m, SPACE T* to,                        \
                                  ulong elements_per_row = C, ulong2 origin = 0,                   \
                                  bool transpose = false) {                                        \
    msl_meet(0u, msl_op_matrix_load);                                                              \
    msl_matrix_place at;                                                                           \
    for (uint k = 0; k < 2; k++) {                                                                 \
      ulong row = transpose ? at.column + k : at.row, column = transpose ? at.row : at.column + k; \
      to[(row + origin.y) * elements_per_row + column + origin.x] = m.msl_elements[k];             \
    }                                                                                              \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
#undef MSL_MATRIX_MEMORY

template <typename A, typename B>
struct msl_matrix_operands {
  vec<A, 2> a;
  vec<B, 2> b;
};
// Products are added in float, each fused into the sum, k from 0 to 7; the sum is rounded once.
template <typename D, typename A, typename B, typename C>
MSL_INLINE void msl_matrix_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                    simdgroup_matrix<A, 8, 8> a,
                                    simdgroup_matrix<B, 8, 8> b,
                                    vec<C, 2> c) {
  typedef msl_matrix_operands<A, B> Operands;
  const thread msl_exchange* x =
      msl_meet(Operands{a.msl_elements, b.msl_elements}, msl_op_matrix_multiply);
  msl_matrix_place at;
  float sum0 = (float)c[0], sum1 = (float)c[1];
  for (uint k = 0; k < 8; k++) {
    float left = (float)msl_value<Operands>(x, msl_matrix_lane(at.row, k)).a[k & 1];
    Operands right = msl_value<Operands>(x, msl_matrix_lane(k, at.column));
    sum0 = __builtin_fmaf(left, (float)right.b[0], sum0);
    sum1 = __builtin_fmaf(left, (float)right.b[1], sum1);
  }
  d.msl_elements[0] = (D)sum0;
  d.msl_elements[1] = (D)sum1;
}
template <typename D, typename A, typename B, typename C>
MSL_INLINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                              simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b,
                                              simdgroup_matrix<C, 8, 8> c) {
  msl_matrix_multiply(d, a, b, c.msl_elements);
}
template <typename D, typename A, typename B>
MSL_INLINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                   simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b) {
  msl_matrix_multiply(d, a, b, (float2)(0.0f));
}
template <typename A, typename B>
MSL_INLINE simdgroup_matrix<A, 8, 8> operator*(simdgroup_matrix<A, 8, 8> a,
                                               simdgroup_matrix<B, 8, 8> b) {
  simdgroup_matrix<A, 8, 8> d;
  msl_matrix_multiply(d, a, b, (float2)(0.0f));
  return d;
}
}  // namespace metal
