// Floating-point functions, for float, half and their vectors.
//
// The functions of one argument that are not exact come from the runtime, which computes them in
// double: correctly rounded but for about one result in 2^29, on every host. Half computes in float
// and rounds once more.

// clang-format off
#define MSL_RUNTIME_1(X)                                                                       \
  X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atanh) X(cos) X(cosh) X(cospi) X(exp) X(exp10)   \
  X(exp2) X(log) X(log10) X(log2) X(rsqrt) X(sin) X(sinh) X(sinpi) X(tan) X(tanh) X(tanpi)
// clang-format on
#define MSL_EXACT_1(X) X(ceil) X(floor) X(fract) X(rint) X(round) X(sqrt) X(trunc)
#define MSL_RUNTIME_2(X) X(atan2) X(fmod) X(pow) X(powr)
#define MSL_EXACT_2(X) X(divide) X(fdim) X(fmax) X(fmin)

#define X(name) extern "C" float msl_##name(float) __attribute__((const));
MSL_RUNTIME_1(X)
#undef X
#define X(name) extern "C" float msl_##name(float, float) __attribute__((const));
MSL_RUNTIME_2(X)
#undef X
extern "C" float msl_nextafter(float, float) __attribute__((const));
extern "C" float msl_ldexp(float, int) __attribute__((const));
extern "C" float msl_frexp(float, thread int*);

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

MSL_INLINE float msl_ceil(float x) {
  return __builtin_ceilf(x);
}
MSL_INLINE float msl_floor(float x) {
  return __builtin_floorf(x);
}
MSL_INLINE float msl_rint(float x) {
  return __builtin_rintf(x);
}
MSL_INLINE float msl_round(float x) {
  return __builtin_roundf(x);
}
MSL_INLINE float msl_sqrt(float x) {
  return __builtin_sqrtf(x);
}
MSL_INLINE float msl_trunc(float x) {
  return __builtin_truncf(x);
}
MSL_INLINE float msl_fabs(float x) {
  return __builtin_fabsf(x);
}
MSL_INLINE float msl_divide(float x, float y) {
  return x / y;
}
MSL_INLINE float msl_fmin(float x, float y) {
  return __builtin_fminf(x, y);
}
MSL_INLINE float msl_fmax(float x, float y) {
  return __builtin_fmaxf(x, y);
}
MSL_INLINE float msl_fdim(float x, float y) {
  return x > y ? x - y : x <= y ? 0.0f : x + y;
}
// Below one even where x is a tiny negative number, as the language asks.
MSL_INLINE float msl_fract(float x) {
  return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f);
}

namespace metal {

// The names Apple's own headers call, and MLX's with them; the last argument chooses fast or
// precise.
#define X(name)                                   \
  MSL_INLINE float __metal_##name(float x, int) { \
    return msl_##name(x);                         \
  }
MSL_RUNTIME_1(X)
MSL_EXACT_1(X)
X(fabs)
#undef X
#define X(name)                                            \
  MSL_INLINE float __metal_##name(float x, float y, int) { \
    return msl_##name(x, y);                               \
  }
MSL_RUNTIME_2(X)
MSL_EXACT_2(X)
#undef X
MSL_INLINE float __metal_fma(float x, float y, float z) {
  return __builtin_fmaf(x, y, z);
}
MSL_INLINE float __metal_nextafter(float x, float y) {
  return msl_nextafter(x, y);
}
MSL_INLINE float __metal_ldexp(float x, int k, int) {
  return msl_ldexp(x, k);
}
MSL_INLINE float __metal_frexp(float x, thread int* k) {
  return msl_frexp(x, k);
}
MSL_INLINE float __metal_fmin3(float x, float y, float z, int) {
  return msl_fmin(x, msl_fmin(y, z));
}
MSL_INLINE float __metal_fmax3(float x, float y, float z, int) {
  return msl_fmax(x, msl_fmax(y, z));
}
MSL_INLINE float __metal_fmedian3(float x, float y, float z, int) {
  return msl_fmax(msl_fmin(x, y), msl_fmin(msl_fmax(x, y), z));
}

#define MSL_FLOAT_1(name)                          \
  MSL_INLINE float name(float x) {                 \
    return msl_##name(x);                          \
  }                                                \
  template <int N>                                 \
  MSL_INLINE vec<float, N> name(vec<float, N> x) { \
    for (int i = 0; i < N; i++)                    \
      x[i] = msl_##name(x[i]);                     \
    return x;                                      \
  }
#define MSL_HALF_1(name)                         \
  MSL_INLINE half name(half x) {                 \
    return (half)msl_##name((float)x);           \
  }                                              \
  template <int N>                               \
  MSL_INLINE vec<half, N> name(vec<half, N> x) { \
    for (int i = 0; i < N; i++)                  \
      x[i] = (half)msl_##name((float)x[i]);      \
    return x;                                    \
  }
#define MSL_FLOAT_2(name)                                           \
  MSL_INLINE float name(float x, float y) {                         \
    return msl_##name(x, y);                                        \
  }                                                                 \
  template <int N>                                                  \
  MSL_INLINE vec<float, N> name(vec<float, N> x, vec<float, N> y) { \
    for (int i = 0; i < N; i++)                                     \
      x[i] = msl_##name(x[i], y[i]);                                \
    return x;                                                       \
  }
#define MSL_HALF_2(name)                                         \
  MSL_INLINE half name(half x, half y) {                         \
    return (half)msl_##name((float)x, (float)y);                 \
  }                                                              \
  template <int N>                                               \
  MSL_INLINE vec<half, N> name(vec<half, N> x, vec<half, N> y) { \
    for (int i = 0; i < N; i++)                                  \
      x[i] = (half)msl_##name((float)x[i], (float)y[i]);         \
    return x;                                                    \
  }
// clang-format off
MSL_RUNTIME_1(MSL_FLOAT_1) MSL_EXACT_1(MSL_FLOAT_1) MSL_FLOAT_1(fabs)
MSL_RUNTIME_1(MSL_HALF_1) MSL_EXACT_1(MSL_HALF_1) MSL_HALF_1(fabs)
MSL_RUNTIME_2(MSL_FLOAT_2) MSL_EXACT_2(MSL_FLOAT_2)
MSL_RUNTIME_2(MSL_HALF_2) MSL_EXACT_2(MSL_HALF_2)
// fast:: and precise:: have float only: a half argument is computed in float and stays float.
namespace fast {
MSL_RUNTIME_1(MSL_FLOAT_1) MSL_EXACT_1(MSL_FLOAT_1) MSL_FLOAT_1(fabs)
MSL_RUNTIME_2(MSL_FLOAT_2) MSL_EXACT_2(MSL_FLOAT_2)
}  // namespace fast
namespace precise {
MSL_RUNTIME_1(MSL_FLOAT_1) MSL_EXACT_1(MSL_FLOAT_1) MSL_FLOAT_1(fabs)
MSL_RUNTIME_2(MSL_FLOAT_2) MSL_EXACT_2(MSL_FLOAT_2)
}  // namespace precise
// clang-format on
#undef MSL_FLOAT_1
#undef MSL_HALF_1
#undef MSL_FLOAT_2
#undef MSL_HALF_2

MSL_INLINE float fma(float x, float y, float z) {
  return __builtin_fmaf(x, y, z);
}
// One rounding: the build turns this multiplication and addition into an exact half fma
// (contraction.py).
MSL_INLINE half fma(half x, half y, half z) {
  return x * y + z;
}
template <typename T, int N>
MSL_INLINE vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {
  for (int i = 0; i < N; i++)
    x[i] = fma(x[i], y[i], z[i]);
  return x;
}

#define MSL_FLOAT(T)                                                 \
  MSL_INLINE T nextafter(T x, T y);                                  \
  MSL_INLINE T fmin3(T x, T y, T z) {                                \
    return fmin(x, fmin(y, z));                                      \
  }                                                                  \
  MSL_INLINE T fmax3(T x, T y, T z) {                                \
    return fmax(x, fmax(y, z));                                      \
  }                                                                  \
  MSL_INLINE T fmedian3(T x, T y, T z) {                             \
    return fmax(fmin(x, y), fmin(fmax(x, y), z));                    \
  }                                                                  \
  MSL_INLINE T copysign(T x, T y) {                                  \
    return (T)__builtin_copysignf((float)x, (float)y);               \
  }                                                                  \
  MSL_INLINE T ldexp(T x, int k) {                                   \
    return (T)msl_ldexp((float)x, k);                                \
  }                                                                  \
  MSL_INLINE T frexp(T x, thread int& k) {                           \
    return (T)msl_frexp((float)x, &k);                               \
  }                                                                  \
  MSL_INLINE T modf(T x, thread T& whole) {                          \
    whole = trunc(x);                                                \
    return copysign(x - whole, x);                                   \
  }                                                                  \
  MSL_INLINE T sincos(T x, thread T& c) {                            \
    c = cos(x);                                                      \
    return sin(x);                                                   \
  }                                                                  \
  MSL_INLINE int ilogb(T x) {                                        \
    return __builtin_ilogbf((float)x);                               \
  }                                                                  \
  MSL_INLINE T min(T x, T y) {                                       \
    return fmin(x, y);                                               \
  }                                                                  \
  MSL_INLINE T max(T x, T y) {                                       \
    return fmax(x, y);                                               \
  }                                                                  \
  MSL_INLINE T clamp(T x, T low, T high) {                           \
    return fmin(fmax(x, low), high);                                 \
  }                                                                  \
  MSL_INLINE T min3(T x, T y, T z) {                                 \
    return fmin3(x, y, z);                                           \
  }                                                                  \
  MSL_INLINE T max3(T x, T y, T z) {                                 \
    return fmax3(x, y, z);                                           \
  }                                                                  \
  MSL_INLINE T median3(T x, T y, T z) {                              \
    return fmedian3(x, y, z);                                        \
  }                                                                  \
  MSL_INLINE T abs(T x) {                                            \
    return fabs(x);                                                  \
  }                                                                  \
  MSL_INLINE T saturate(T x) {                                       \
    return clamp(x, (T)0, (T)1);                                     \
  }                                                                  \
  MSL_INLINE T sign(T x) {                                           \
    return x > (T)0 ? (T)1 : x < (T)0 ? (T) - 1 : x == x ? x : (T)0; \
  }                                                                  \
  MSL_INLINE T mix(T x, T y, T a) {                                  \
    return x + (y - x) * a;                                          \
  }                                                                  \
  MSL_INLINE T step(T edge, T x) {                                   \
    return x < edge ? (T)0 : (T)1;                                   \
  }                                                                  \
  MSL_INLINE T smoothstep(T low, T high, T x) {                      \
    T t = saturate((x - low) / (high - low));                        \
    return t * t * ((T)3 - (T)2 * t);                                \
  }
MSL_FLOAT(float)
MSL_FLOAT(half)
#undef MSL_FLOAT
MSL_INLINE float nextafter(float x, float y) {
  return msl_nextafter(x, y);
}
MSL_INLINE half nextafter(half x, half y) {
  if (x != x || y != y)
    return x + y;
  if (x == y)
    return y;
  ushort bits = as_type<ushort>(x);
  if ((bits & 0x7fff) == 0)
    return as_type<half>((ushort)(y > (half)0 ? 1 : 0x8001));
  return as_type<half>((ushort)(bits + ((y > x) == (x > (half)0) ? 1 : -1)));
}

#define MSL_LANES_1(name)                  \
  template <typename T, int N>             \
  MSL_INLINE vec<T, N> name(vec<T, N> x) { \
    for (int i = 0; i < N; i++)            \
      x[i] = name((T)x[i]);                \
    return x;                              \
  }
#define MSL_LANES_2(name)                               \
  template <typename T, int N>                          \
  MSL_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y) { \
    for (int i = 0; i < N; i++)                         \
      x[i] = name((T)x[i], (T)y[i]);                    \
    return x;                                           \
  }
#define MSL_LANES_3(name)                                            \
  template <typename T, int N>                                       \
  MSL_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y, vec<T, N> z) { \
    for (int i = 0; i < N; i++)                                      \
      x[i] = name((T)x[i], (T)y[i], (T)z[i]);                        \
    return x;                                                        \
  }
MSL_LANES_1(saturate)
MSL_LANES_1(sign)
MSL_LANES_2(copysign)
MSL_LANES_2(nextafter)
MSL_LANES_2(step)
MSL_LANES_3(mix)
MSL_LANES_3(smoothstep)
MSL_LANES_3(fmin3)
MSL_LANES_3(fmax3)
MSL_LANES_3(fmedian3)

}  // namespace metal
