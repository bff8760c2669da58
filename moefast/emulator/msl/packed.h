// Functions of packed vectors: those of the vectors they convert to, which a template does not
// find.
namespace metal {

// clang-format off
#define MSL_OF_PACKED_1(X)                                                                             \
  X(abs) X(acos) X(acosh) X(all) X(any) X(asin) X(asinh) X(atan) X(atanh) X(ceil) X(clz) X(cos) X(cosh) \
  X(cospi) X(ctz) X(exp) X(exp10) X(exp2) X(fabs) X(floor) X(fract) X(isfinite) X(isinf) X(isnan)      \
  X(isnormal) X(length) X(length_squared) X(log) X(log10) X(log2) X(normalize) X(popcount)             \
  X(reverse_bits) X(rint) X(round) X(rsqrt) X(saturate) X(sign) X(signbit) X(sin) X(sinh) X(sinpi)     \
  X(sqrt) X(tan) X(tanh) X(tanpi) X(trunc)
#define MSL_OF_PACKED_2(X)                                                                             \
  X(atan2) X(copysign) X(cross) X(distance) X(distance_squared) X(divide) X(dot) X(fdim) X(fmax)       \
  X(fmin) X(fmod) X(max) X(min) X(mulhi) X(pow) X(powr) X(reflect) X(rotate) X(step)
// clang-format on

#define X(name)                              \
  template <typename T, int N>               \
  MSL_INLINE auto name(msl_packed<T, N> x) { \
    return name((vec<T, N>)x);               \
  }
MSL_OF_PACKED_1(X)
#undef X
#define X(name)                                                  \
  template <typename T, int N>                                   \
  MSL_INLINE auto name(msl_packed<T, N> x, msl_packed<T, N> y) { \
    return name((vec<T, N>)x, (vec<T, N>)y);                     \
  }                                                              \
  template <typename T, int N>                                   \
  MSL_INLINE auto name(msl_packed<T, N> x, vec<T, N> y) {        \
    return name((vec<T, N>)x, y);                                \
  }                                                              \
  template <typename T, int N>                                   \
  MSL_INLINE auto name(vec<T, N> x, msl_packed<T, N> y) {        \
    return name(x, (vec<T, N>)y);                                \
  }
MSL_OF_PACKED_2(X)
#undef X
#undef MSL_OF_PACKED_1
#undef MSL_OF_PACKED_2

// Of three: any of them packed, the last two scalars or vectors.
template <typename T>
MSL_INLINE T msl_unpacked(T x) {
  return x;
}
template <typename T, int N>
MSL_INLINE vec<T, N> msl_unpacked(msl_packed<T, N> x) {
  return x;
}
#define X(name)                                                             \
  template <typename T, int N, typename B, typename C>                      \
  MSL_INLINE vec<T, N> name(msl_packed<T, N> x, B y, C z) {                 \
    return name((vec<T, N>)x, msl_unpacked(y), msl_unpacked(z));            \
  }                                                                         \
  template <typename T, int N, typename C>                                  \
  MSL_INLINE vec<T, N> name(vec<T, N> x, msl_packed<T, N> y, C z) {         \
    return name(x, (vec<T, N>)y, msl_unpacked(z));                          \
  }                                                                         \
  template <typename T, int N>                                              \
  MSL_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y, msl_packed<T, N> z) { \
    return name(x, y, (vec<T, N>)z);                                        \
  }
X(clamp)
X(fma)
X(mix)
X(smoothstep)
#undef X
}  // namespace metal
