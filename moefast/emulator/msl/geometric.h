// Geometric functions, and numbers packed into words.
namespace metal {

// Products are summed from the first lane on, each fused into the sum.
template <typename T, int N, typename = enable_if_t<is_floating_point_v<T>>>
MSL_INLINE T dot(vec<T, N> x, vec<T, N> y) {
  T sum = (T)(x[0] * y[0]);
  for (int i = 1; i < N; i++)
    sum = x[i] * y[i] + sum;
  return sum;
}
template <typename T, int N>
MSL_INLINE T length_squared(vec<T, N> x) {
  return dot(x, x);
}
template <typename T, int N>
MSL_INLINE T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}
template <typename T, int N>
MSL_INLINE T distance_squared(vec<T, N> x, vec<T, N> y) {
  return dot(x - y, x - y);
}
template <typename T, int N>
MSL_INLINE T distance(vec<T, N> x, vec<T, N> y) {
  return length(x - y);
}
template <typename T, int N>
MSL_INLINE vec<T, N> normalize(vec<T, N> x) {
  return x * rsqrt(dot(x, x));
}
template <typename T>
MSL_INLINE vec<T, 3> cross(vec<T, 3> x, vec<T, 3> y) {
  return x.yzx * y.zxy - x.zxy * y.yzx;
}
template <typename T, int N>
MSL_INLINE vec<T, N> reflect(vec<T, N> x, vec<T, N> n) {
  return x - n * ((T)2 * dot(n, x));
}
template <typename T, int N>
MSL_INLINE vec<T, N> faceforward(vec<T, N> n, vec<T, N> i, vec<T, N> reference) {
  return dot(reference, i) < (T)0 ? n : -n;
}
template <typename T, int N>
MSL_INLINE vec<T, N> refract(vec<T, N> i, vec<T, N> n, T eta) {
  T along = dot(n, i), rest = (T)1 - eta * eta * ((T)1 - along * along);
  return rest < (T)0 ? (vec<T, N>)(T)0 : i * eta - n * (eta * along + sqrt(rest));
}

// Numbers between 0 and 1 (unorm) or -1 and 1 (snorm) in the bytes or halves of a word, the first
// lane lowest.
#define MSL_PACKING(BITS, LANES, Integer)                                                        \
  MSL_INLINE uint pack_float_to_unorm##LANES##x##BITS(vec<float, LANES> v) {                     \
    uint word = 0;                                                                               \
    for (int i = 0; i < LANES; i++)                                                              \
      word |= (uint)rint(saturate(v[i]) * (float)((1u << BITS) - 1)) << (BITS * i);              \
    return word;                                                                                 \
  }                                                                                              \
  MSL_INLINE uint pack_float_to_snorm##LANES##x##BITS(vec<float, LANES> v) {                     \
    uint word = 0, mask = (1u << BITS) - 1;                                                      \
    for (int i = 0; i < LANES; i++) {                                                            \
      float scaled = clamp(v[i], -1.0f, 1.0f) * (float)(mask >> 1);                              \
      word |= ((uint)(int)rint(scaled) & mask) << (BITS * i);                                    \
    }                                                                                            \
    return word;                                                                                 \
  }                                                                                              \
  MSL_INLINE vec<float, LANES> unpack_unorm##LANES##x##BITS##_to_float(uint word) {              \
    vec<float, LANES> v;                                                                         \
    uint mask = (1u << BITS) - 1;                                                                \
    for (int i = 0; i < LANES; i++)                                                              \
      v[i] = (float)(word >> (BITS * i) & mask) / (float)mask;                                   \
    return v;                                                                                    \
  }                                                                                              \
  MSL_INLINE vec<float, LANES> unpack_snorm##LANES##x##BITS##_to_float(uint word) {              \
    vec<float, LANES> v;                                                                         \
    for (int i = 0; i < LANES; i++)                                                              \
      v[i] = fmax((float)(Integer)(word >> (BITS * i)) / (float)((1 << (BITS - 1)) - 1), -1.0f); \
    return v;                                                                                    \
  }                                                                                              \
  MSL_INLINE uint pack_half_to_unorm##LANES##x##BITS(vec<half, LANES> v) {                       \
    return pack_float_to_unorm##LANES##x##BITS(msl_make<vec<float, LANES>>(v));                  \
  }                                                                                              \
  MSL_INLINE uint pack_half_to_snorm##LANES##x##BITS(vec<half, LANES> v) {                       \
    return pack_float_to_snorm##LANES##x##BITS(msl_make<vec<float, LANES>>(v));                  \
  }                                                                                              \
  MSL_INLINE vec<half, LANES> unpack_unorm##LANES##x##BITS##_to_half(uint word) {                \
    return msl_make<vec<half, LANES>>(unpack_unorm##LANES##x##BITS##_to_float(word));            \
  }                                                                                              \
  MSL_INLINE vec<half, LANES> unpack_snorm##LANES##x##BITS##_to_half(uint word) {                \
    return msl_make<vec<half, LANES>>(unpack_snorm##LANES##x##BITS##_to_float(word));            \
  }
MSL_PACKING(8, 4, char)
MSL_PACKING(16, 2, short)
#undef MSL_PACKING
}  // namespace metal
