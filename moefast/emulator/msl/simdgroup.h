// Functions of simdgroups and quadgroups. Scalars are overloads, so that arguments convert as Metal
// converts them (bool to int) and what Metal does not have (long, bfloat) is ambiguous here too.
//
// Reductions add lanes 16 apart, then 8, 4, 2, 1: ((v0+v16)+(v8+v24))+... ; prefix sums go from
// lane 0 on. Lanes that do not take part are left out.

namespace metal {

#define MSL_COMBINE(name, expression)         \
  template <typename T>                       \
  MSL_INLINE T msl_combine_##name(T a, T b) { \
    return expression;                        \
  }
MSL_COMBINE(sum, (T)(a + b))
MSL_COMBINE(product, (T)(a * b))
MSL_COMBINE(max, max(a, b))
MSL_COMBINE(min, min(a, b))
MSL_COMBINE(and, (T)(a & b))
MSL_COMBINE(or, (T)(a | b))
MSL_COMBINE(xor, (T)(a ^ b))
#undef MSL_COMBINE
// MLX reduces bfloat through float, xor included; it is of the bits.
MSL_INLINE float msl_combine_xor(float a, float b) {
  return as_type<float>(as_type<uint>(a) ^ as_type<uint>(b));
}
MSL_INLINE half msl_combine_xor(half a, half b) {
  return as_type<half>((ushort)(as_type<ushort>(a) ^ as_type<ushort>(b)));
}

#define MSL_REDUCTION(name)                                                        \
  template <typename T>                                                            \
  MSL_INLINE T msl_simd_##name(T value) {                                          \
    thread msl_exchange* x = (thread msl_exchange*)msl_meet(value, msl_op_reduce); \
    T total;                                                                       \
    if (!x->done) {                                                                \
      T v[32];                                                                     \
      uint on = x->mask;                                                           \
      for (uint i = 0; i < 32; i++)                                                \
        v[i] = msl_value<T>(x, i);                                                 \
      for (uint apart = 16; apart > 0; apart >>= 1)                                \
        for (uint i = 0; i < apart; i++) {                                         \
          bool here = (on >> i) & 1, there = (on >> (i + apart)) & 1;              \
          if (there)                                                               \
            v[i] = here ? msl_combine_##name(v[i], v[i + apart]) : v[i + apart];   \
          on |= (uint)there << i;                                                  \
        }                                                                          \
      __builtin_memcpy(x->result, &v[0], sizeof(T));                               \
      x->done = 1;                                                                 \
    }                                                                              \
    __builtin_memcpy(&total, x->result, sizeof(T));                                \
    return total;                                                                  \
  }                                                                                \
  template <typename T>                                                            \
  MSL_INLINE T msl_quad_##name(T value) {                                          \
    const thread msl_exchange* x = msl_meet(value, msl_op_quad);                   \
    uint first = msl_lane() & 28u;                                                 \
    T v[4];                                                                        \
    bool on[4];                                                                    \
    for (uint i = 0; i < 4; i++)                                                   \
      v[i] = msl_value<T>(x, first + i), on[i] = msl_active(x, first + i);         \
    for (uint apart = 2; apart > 0; apart >>= 1)                                   \
      for (uint i = 0; i < apart; i++) {                                           \
        if (on[i + apart])                                                         \
          v[i] = on[i] ? msl_combine_##name(v[i], v[i + apart]) : v[i + apart];    \
        on[i] = on[i] || on[i + apart];                                            \
      }                                                                            \
    return v[0];                                                                   \
  }
MSL_REDUCTION(sum)
MSL_REDUCTION(product)
MSL_REDUCTION(max)
MSL_REDUCTION(min)
MSL_REDUCTION(and)
MSL_REDUCTION(or)
MSL_REDUCTION(xor)
#undef MSL_REDUCTION

#define MSL_PREFIX(which, name, FIRST, UNTIL)                      \
  template <typename T>                                            \
  MSL_INLINE T msl_##which##_prefix_##name(T value) {              \
    const thread msl_exchange* x = msl_meet(value, msl_op_prefix); \
    uint me = msl_lane();                                          \
    T total = (T)FIRST;                                            \
    for (uint i = 0; i < me + UNTIL; i++)                          \
      if (msl_active(x, i))                                        \
        total = msl_combine_##which(total, msl_value<T>(x, i));    \
    return total;                                                  \
  }                                                                \
  template <typename T>                                            \
  MSL_INLINE T msl_quad_##which##_prefix_##name(T value) {         \
    const thread msl_exchange* x = msl_meet(value, msl_op_quad);   \
    uint me = msl_lane();                                          \
    T total = (T)FIRST;                                            \
    for (uint i = me & 28u; i < me + UNTIL; i++)                   \
      if (msl_active(x, i))                                        \
        total = msl_combine_##which(total, msl_value<T>(x, i));    \
    return total;                                                  \
  }
MSL_PREFIX(sum, inclusive, 0, 1)
MSL_PREFIX(sum, exclusive, 0, 0)
MSL_PREFIX(product, inclusive, 1, 1)
MSL_PREFIX(product, exclusive, 1, 0)
#undef MSL_PREFIX

// A lane outside the simdgroup gives the caller's own value.
#define MSL_SHUFFLE(name, FROM)                                                   \
  template <typename T>                                                           \
  MSL_INLINE T msl_simd_##name(T value, ushort n) {                               \
    const thread msl_exchange* x = msl_meet(value, msl_op_shuffle);               \
    int me = (int)msl_lane();                                                     \
    int from = FROM;                                                              \
    (void)me;                                                                     \
    return from >= 0 && from < 32 ? msl_value<T>(x, (uint)from) : value;          \
  }                                                                               \
  template <typename T>                                                           \
  MSL_INLINE T msl_quad_##name(T value, ushort n) {                               \
    const thread msl_exchange* x = msl_meet(value, msl_op_quad);                  \
    int first = (int)(msl_lane() & 28u), me = (int)(msl_lane() & 3u);             \
    int from = FROM;                                                              \
    (void)me;                                                                     \
    return from >= 0 && from < 4 ? msl_value<T>(x, (uint)(first + from)) : value; \
  }
MSL_SHUFFLE(shuffle, (int)n)
MSL_SHUFFLE(broadcast, (int)n)
MSL_SHUFFLE(shuffle_down, me + (int)n)
MSL_SHUFFLE(shuffle_up, me - (int)n)
MSL_SHUFFLE(shuffle_xor, me ^ (int)n)
#undef MSL_SHUFFLE
#define MSL_ROTATE(name, FROM)                                               \
  template <typename T>                                                      \
  MSL_INLINE T msl_simd_##name(T value, ushort n) {                          \
    const thread msl_exchange* x = msl_meet(value, msl_op_shuffle);          \
    return msl_value<T>(x, (msl_lane() FROM n) & 31u);                       \
  }                                                                          \
  template <typename T>                                                      \
  MSL_INLINE T msl_quad_##name(T value, ushort n) {                          \
    const thread msl_exchange* x = msl_meet(value, msl_op_quad);             \
    return msl_value<T>(x, (msl_lane() & 28u) + ((msl_lane() FROM n) & 3u)); \
  }
MSL_ROTATE(shuffle_rotate_down, +)
MSL_ROTATE(shuffle_rotate_up, -)
#undef MSL_ROTATE

template <typename T>
struct msl_pair {
  T value, fill;
};
// `modulo` splits the simdgroup into parts of that many lanes; what falls off one end comes from
// `fill`.
template <typename T>
MSL_INLINE T msl_simd_shuffle_and_fill_up(T value, T fill, ushort n, ushort modulo) {
  const thread msl_exchange* x = msl_meet(msl_pair<T>{value, fill}, msl_op_shuffle);
  uint me = msl_lane(), first = me - me % modulo;
  int from = (int)(me - first) - (int)n;
  if (from >= 0)
    return msl_value<msl_pair<T>>(x, first + from).value;
  return msl_value<msl_pair<T>>(x, first + from + modulo).fill;
}
template <typename T>
MSL_INLINE T msl_simd_shuffle_and_fill_down(T value, T fill, ushort n, ushort modulo) {
  const thread msl_exchange* x = msl_meet(msl_pair<T>{value, fill}, msl_op_shuffle);
  uint me = msl_lane(), first = me - me % modulo, from = me - first + n;
  if (from < modulo)
    return msl_value<msl_pair<T>>(x, first + from).value;
  return msl_value<msl_pair<T>>(x, first + from - modulo).fill;
}
template <typename T>
MSL_INLINE T msl_quad_shuffle_and_fill_up(T value, T fill, ushort n, ushort modulo) {
  const thread msl_exchange* x = msl_meet(msl_pair<T>{value, fill}, msl_op_quad);
  uint me = msl_lane(), first = me - (me & 3u) % modulo;
  int from = (int)(me - first) - (int)n;
  if (from >= 0)
    return msl_value<msl_pair<T>>(x, first + from).value;
  return msl_value<msl_pair<T>>(x, first + from + modulo).fill;
}
template <typename T>
MSL_INLINE T msl_quad_shuffle_and_fill_down(T value, T fill, ushort n, ushort modulo) {
  const thread msl_exchange* x = msl_meet(msl_pair<T>{value, fill}, msl_op_quad);
  uint me = msl_lane(), first = me - (me & 3u) % modulo, from = me - first + n;
  if (from < modulo)
    return msl_value<msl_pair<T>>(x, first + from).value;
  return msl_value<msl_pair<T>>(x, first + from - modulo).fill;
}
template <typename T>
MSL_INLINE T msl_simd_broadcast_first(T value) {
  const thread msl_exchange* x = msl_meet(value, msl_op_shuffle);
  return msl_value<T>(x, (uint)__builtin_ctz(x->mask));
}
template <typename T>
MSL_INLINE T msl_quad_broadcast_first(T value) {
  const thread msl_exchange* x = msl_meet(value, msl_op_quad);
  uint first = msl_lane() & 28u;
  while (!msl_active(x, first))
    first++;
  return msl_value<T>(x, first);
}

// Each function for the scalars and for vectors of them, in simdgroups and in quadgroups, and under
// the internal name that MLX's bfloat overloads call.
// clang-format off
#define MSL_INTEGERS(X, name, from)                                                            \
  X(char, name, from) X(uchar, name, from) X(short, name, from) X(ushort, name, from)          \
  X(int, name, from) X(uint, name, from)
#define MSL_SCALARS(X, name, from) \
  MSL_INTEGERS(X, name, from) X(half, name, from) X(float, name, from)
// clang-format on
#define MSL_UNARY_OF(T, name, from) \
  MSL_INLINE T name(T value) {      \
    return from(value);             \
  }
#define MSL_UNARY(name, from, TYPES)           \
  TYPES(MSL_UNARY_OF, name, from)              \
  template <typename T, int N>                 \
  MSL_INLINE vec<T, N> name(vec<T, N> value) { \
    return from(value);                        \
  }
#define MSL_LANE_OF(T, name, from)       \
  MSL_INLINE T name(T value, ushort n) { \
    return from(value, n);               \
  }
#define MSL_LANE(name, from)                             \
  MSL_SCALARS(MSL_LANE_OF, name, from)                   \
  template <typename T, int N>                           \
  MSL_INLINE vec<T, N> name(vec<T, N> value, ushort n) { \
    return from(value, n);                               \
  }
#define MSL_FILL_OF(T, name, lanes)                                 \
  MSL_INLINE T name(T v, T fill, ushort n, ushort modulo = lanes) { \
    return msl_##name(v, fill, n, modulo);                          \
  }
#define MSL_FILL(name, lanes)                                                               \
  MSL_SCALARS(MSL_FILL_OF, name, lanes)                                                     \
  template <typename T, int N>                                                              \
  MSL_INLINE vec<T, N> name(vec<T, N> v, vec<T, N> fill, ushort n, ushort modulo = lanes) { \
    return msl_##name(v, fill, n, modulo);                                                  \
  }

#define MSL_REDUCE(name, TYPES, INTERNAL_TYPES)  \
  MSL_UNARY(simd_##name, msl_simd_##name, TYPES) \
  MSL_UNARY(quad_##name, msl_quad_##name, TYPES) \
  MSL_UNARY(__metal_simd_##name, msl_simd_##name, INTERNAL_TYPES)
MSL_REDUCE(sum, MSL_SCALARS, MSL_SCALARS)
MSL_REDUCE(product, MSL_SCALARS, MSL_SCALARS)
MSL_REDUCE(max, MSL_SCALARS, MSL_SCALARS)
MSL_REDUCE(min, MSL_SCALARS, MSL_SCALARS)
MSL_REDUCE(and, MSL_INTEGERS, MSL_INTEGERS)
MSL_REDUCE(or, MSL_INTEGERS, MSL_INTEGERS)
MSL_REDUCE(xor, MSL_INTEGERS, MSL_SCALARS)
#undef MSL_REDUCE

#define MSL_PREFIXES(which, op)                                                      \
  MSL_UNARY(simd_prefix_##which##_##op, msl_##op##_prefix_##which, MSL_SCALARS)      \
  MSL_UNARY(quad_prefix_##which##_##op, msl_quad_##op##_prefix_##which, MSL_SCALARS) \
  MSL_UNARY(__metal_simd_prefix_##which##_##op, msl_##op##_prefix_##which, MSL_SCALARS)
MSL_PREFIXES(inclusive, sum)
MSL_PREFIXES(exclusive, sum)
MSL_PREFIXES(inclusive, product)
MSL_PREFIXES(exclusive, product)
#undef MSL_PREFIXES

#define MSL_SHUFFLES(name)               \
  MSL_LANE(simd_##name, msl_simd_##name) \
  MSL_LANE(quad_##name, msl_quad_##name) \
  MSL_LANE(__metal_simd_##name, msl_simd_##name)
MSL_SHUFFLES(shuffle)
MSL_SHUFFLES(broadcast)
MSL_SHUFFLES(shuffle_down)
MSL_SHUFFLES(shuffle_up)
MSL_SHUFFLES(shuffle_xor)
MSL_SHUFFLES(shuffle_rotate_down)
MSL_SHUFFLES(shuffle_rotate_up)
#undef MSL_SHUFFLES
MSL_UNARY(simd_broadcast_first, msl_simd_broadcast_first, MSL_SCALARS)
MSL_UNARY(quad_broadcast_first, msl_quad_broadcast_first, MSL_SCALARS)

MSL_FILL(simd_shuffle_and_fill_up, 32)
MSL_FILL(simd_shuffle_and_fill_down, 32)
MSL_FILL(quad_shuffle_and_fill_up, 4)
MSL_FILL(quad_shuffle_and_fill_down, 4)
#undef MSL_UNARY_OF
#undef MSL_UNARY
#undef MSL_LANE_OF
#undef MSL_LANE
#undef MSL_FILL_OF
#undef MSL_FILL
#undef MSL_SCALARS
#undef MSL_INTEGERS

template <typename T>
MSL_INLINE T __metal_simd_shuffle_and_fill_up(T v, T fill, ushort n, ushort modulo) {
  return msl_simd_shuffle_and_fill_up(v, fill, n, modulo);
}
template <typename T>
MSL_INLINE T __metal_simd_shuffle_and_fill_down(T v, T fill, ushort n, ushort modulo) {
  return msl_simd_shuffle_and_fill_down(v, fill, n, modulo);
}
MSL_INLINE ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}
MSL_INLINE ushort __metal_get_thread_index_in_simdgroup(ushort) {
  return (ushort)msl_lane();
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit simd_vote(vote_t b = 0) : bits(b) {}
  explicit operator vote_t() const { return bits; }
  bool all() const { return (uint)bits == ~0u; }
  bool any() const { return bits != 0; }
};
MSL_INLINE uint msl_ballot(bool yes, uint operation) {
  const thread msl_exchange* x = msl_meet((uint)yes, operation);
  uint bits = 0;
  for (uint i = 0; i < 32; i++)
    bits |= (msl_active(x, i) && msl_value<uint>(x, i) ? 1u : 0u) << i;
  return bits;
}
MSL_INLINE simd_vote simd_ballot(bool yes) {
  return simd_vote((ulong)msl_ballot(yes, msl_op_vote));
}
MSL_INLINE simd_vote simd_active_threads_mask() {
  return simd_vote((ulong)msl_ballot(true, msl_op_vote));
}
struct quad_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit quad_vote(vote_t b = 0) : bits(b) {}
  explicit operator vote_t() const { return bits; }
  bool all() const { return bits == 15; }
  bool any() const { return bits != 0; }
};
MSL_INLINE quad_vote quad_ballot(bool yes) {
  return quad_vote((ulong)(msl_ballot(yes, msl_op_quad) >> (msl_lane() & 28u) & 15u));
}
MSL_INLINE quad_vote quad_active_threads_mask() {
  return quad_ballot(true);
}
// There are helper threads in fragment shaders only.
MSL_INLINE bool simd_is_helper_thread() {
  return false;
}
MSL_INLINE bool simd_any(bool yes) {
  return msl_ballot(yes, msl_op_vote) != 0;
}
MSL_INLINE bool simd_all(bool yes) {
  return msl_ballot(!yes, msl_op_vote) == 0;
}
MSL_INLINE bool simd_is_first() {
  return msl_lane() == (uint)__builtin_ctz(msl_ballot(true, msl_op_vote));
}
MSL_INLINE bool quad_any(bool yes) {
  return ((msl_ballot(yes, msl_op_quad) >> (msl_lane() & 28u)) & 15u) != 0;
}
MSL_INLINE bool quad_all(bool yes) {
  return ((msl_ballot(!yes, msl_op_quad) >> (msl_lane() & 28u)) & 15u) == 0;
}
MSL_INLINE bool quad_is_first() {
  return msl_lane() == (msl_lane() & 28u) +
                           (uint)__builtin_ctz(msl_ballot(true, msl_op_quad) >> (msl_lane() & 28u));
}
}  // namespace metal
