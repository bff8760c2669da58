// A scalar where a function wants a vector as the others are: every lane of one, as in any
// expression.

#define MSL_BROADCAST_2(X) \
  X(atan2)                 \
  X(copysign) X(divide) X(fdim) X(fmax) X(fmin) X(fmod) X(max) X(min) X(pow) X(powr) X(step)
#define MSL_BROADCAST_3(X) X(clamp) X(fma) X(mix) X(smoothstep)
#define MSL_OF_2(name)                                                   \
  template <typename T, int N>                                           \
  MSL_INLINE vec<T, N> name(vec<T, N> x, typename msl_same<T>::type y) { \
    return name(x, (vec<T, N>)y);                                        \
  }                                                                      \
  template <typename T, int N>                                           \
  MSL_INLINE vec<T, N> name(typename msl_same<T>::type x, vec<T, N> y) { \
    return name((vec<T, N>)x, y);                                        \
  }
#define MSL_OF_3(name)                                                                  \
  template <typename T, int N>                                                          \
  MSL_INLINE vec<T, N> name(vec<T, N> x, typename msl_same<T>::type y,                  \
                            typename msl_same<T>::type z) {                             \
    return name(x, (vec<T, N>)y, (vec<T, N>)z);                                         \
  }                                                                                     \
  template <typename T, int N>                                                          \
  MSL_INLINE vec<T, N> name(typename msl_same<T>::type x, typename msl_same<T>::type y, \
                            vec<T, N> z) {                                              \
    return name((vec<T, N>)x, (vec<T, N>)y, z);                                         \
  }                                                                                     \
  template <typename T, int N>                                                          \
  MSL_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y, typename msl_same<T>::type z) {   \
    return name(x, y, (vec<T, N>)z);                                                    \
  }                                                                                     \
  template <typename T, int N>                                                          \
  MSL_INLINE vec<T, N> name(vec<T, N> x, typename msl_same<T>::type y, vec<T, N> z) {   \
    return name(x, (vec<T, N>)y, z);                                                    \
  }                                                                                     \
  template <typename T, int N>                                                          \
  MSL_INLINE vec<T, N> name(typename msl_same<T>::type x, vec<T, N> y, vec<T, N> z) {   \
    return name((vec<T, N>)x, y, z);                                                    \
  }
namespace metal {
// clang-format off
MSL_BROADCAST_2(MSL_OF_2) MSL_BROADCAST_3(MSL_OF_3)
namespace fast {
MSL_BROADCAST_2(MSL_OF_2) MSL_OF_3(clamp) MSL_OF_3(mix) MSL_OF_3(smoothstep)
}
namespace precise {
MSL_BROADCAST_2(MSL_OF_2) MSL_OF_3(clamp) MSL_OF_3(mix) MSL_OF_3(smoothstep)
}
// clang-format on
}  // namespace metal
#undef MSL_BROADCAST_2
#undef MSL_BROADCAST_3
#undef MSL_OF_2
#undef MSL_OF_3
