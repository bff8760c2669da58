// fast:: and precise:: beyond math.h: float only, and the same as without.
#define MSL_VARIANT_1(X) X(saturate) X(sign)
#define MSL_VARIANT_2(X) X(copysign) X(max) X(min) X(step)
#define MSL_VARIANT_3(X) \
  X(clamp) X(fmax3) X(fmedian3) X(fmin3) X(max3) X(median3) X(min3) X(mix) X(smoothstep)
#define MSL_OF_1(name)                             \
  MSL_INLINE float name(float x) {                 \
    return metal::name(x);                         \
  }                                                \
  template <int N>                                 \
  MSL_INLINE vec<float, N> name(vec<float, N> x) { \
    return metal::name(x);                         \
  }
#define MSL_OF_2(name)                                              \
  MSL_INLINE float name(float x, float y) {                         \
    return metal::name(x, y);                                       \
  }                                                                 \
  template <int N>                                                  \
  MSL_INLINE vec<float, N> name(vec<float, N> x, vec<float, N> y) { \
    return metal::name(x, y);                                       \
  }
#define MSL_OF_3(name)                                                               \
  MSL_INLINE float name(float x, float y, float z) {                                 \
    return metal::name(x, y, z);                                                     \
  }                                                                                  \
  template <int N>                                                                   \
  MSL_INLINE vec<float, N> name(vec<float, N> x, vec<float, N> y, vec<float, N> z) { \
    return metal::name(x, y, z);                                                     \
  }
#define MSL_VARIANTS                                                              \
  MSL_VARIANT_1(MSL_OF_1)                                                         \
  MSL_VARIANT_2(MSL_OF_2) MSL_VARIANT_3(MSL_OF_3) MSL_INLINE float abs(float x) { \
    return metal::fabs(x);                                                        \
  }                                                                               \
  template <int N>                                                                \
  MSL_INLINE vec<float, N> abs(vec<float, N> x) {                                 \
    return metal::fabs(x);                                                        \
  }                                                                               \
  MSL_INLINE float frexp(float x, thread int& exponent) {                         \
    return metal::frexp(x, exponent);                                             \
  }                                                                               \
  MSL_INLINE float ldexp(float x, int exponent) {                                 \
    return metal::ldexp(x, exponent);                                             \
  }                                                                               \
  MSL_INLINE float modf(float x, thread float& whole) {                           \
    return metal::modf(x, whole);                                                 \
  }                                                                               \
  MSL_INLINE float sincos(float x, thread float& cosine) {                        \
    return metal::sincos(x, cosine);                                              \
  }                                                                               \
  template <int N>                                                                \
  MSL_INLINE float length(vec<float, N> x) {                                      \
    return metal::length(x);                                                      \
  }                                                                               \
  template <int N>                                                                \
  MSL_INLINE float distance(vec<float, N> x, vec<float, N> y) {                   \
    return metal::distance(x, y);                                                 \
  }                                                                               \
  template <int N>                                                                \
  MSL_INLINE vec<float, N> normalize(vec<float, N> x) {                           \
    return metal::normalize(x);                                                   \
  }
namespace metal {
namespace fast {
MSL_VARIANTS
}
namespace precise {
MSL_VARIANTS
}
}  // namespace metal
#undef MSL_OF_1
#undef MSL_OF_2
#undef MSL_OF_3
#undef MSL_VARIANT_1
#undef MSL_VARIANT_2
#undef MSL_VARIANT_3
#undef MSL_VARIANTS
