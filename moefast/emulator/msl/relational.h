// Relational functions.
namespace metal {

#define MSL_RELATIONAL(T)                                      \
  MSL_INLINE bool isnan(T x) {                                 \
    return x != x;                                             \
  }                                                            \
  MSL_INLINE bool isinf(T x) {                                 \
    return __builtin_fabsf((float)x) == __builtin_inff();      \
  }                                                            \
  MSL_INLINE bool isfinite(T x) {                              \
    return __builtin_fabsf((float)x) < __builtin_inff();       \
  }                                                            \
  MSL_INLINE bool isnormal(T x) {                              \
    return isfinite(x) && fabs(x) >= numeric_limits<T>::min(); \
  }                                                            \
  MSL_INLINE bool isordered(T x, T y) {                        \
    return x == x && y == y;                                   \
  }                                                            \
  MSL_INLINE bool isunordered(T x, T y) {                      \
    return x != x || y != y;                                   \
  }
MSL_RELATIONAL(float)
MSL_RELATIONAL(half)
#undef MSL_RELATIONAL
MSL_INLINE bool isnan(bfloat x) {
  return x != x;
}
MSL_INLINE bool isinf(bfloat x) {
  return isinf((float)x);
}
MSL_INLINE bool isfinite(bfloat x) {
  return isfinite((float)x);
}
MSL_INLINE bool signbit(float x) {
  return as_type<uint>(x) >> 31;
}
MSL_INLINE bool signbit(half x) {
  return as_type<ushort>(x) >> 15;
}
MSL_INLINE bool signbit(bfloat x) {
  return as_type<ushort>(x) >> 15;
}

#define MSL_LANES(name)                             \
  template <typename T, int N>                      \
  MSL_INLINE msl_bool_vector<N> name(vec<T, N> x) { \
    msl_bool_vector<N> r;                           \
    for (int i = 0; i < N; i++)                     \
      r[i] = name((T)x[i]);                         \
    return r;                                       \
  }
MSL_LANES(isnan)
MSL_LANES(isinf)
MSL_LANES(isfinite)
MSL_LANES(isnormal)
MSL_LANES(signbit)
#undef MSL_LANES

MSL_INLINE bool any(bool x) {
  return x;
}
MSL_INLINE bool all(bool x) {
  return x;
}
template <int N>
MSL_INLINE bool any(msl_bool_vector<N> x) {
  bool r = false;
  for (int i = 0; i < N; i++)
    r = r || x[i];
  return r;
}
template <int N>
MSL_INLINE bool all(msl_bool_vector<N> x) {
  bool r = true;
  for (int i = 0; i < N; i++)
    r = r && x[i];
  return r;
}
template <typename T, int N>
MSL_INLINE bool any(vec<T, N> x) {
  return any(msl_bool_vector<N>(x));
}
template <typename T, int N>
MSL_INLINE bool all(vec<T, N> x) {
  return all(msl_bool_vector<N>(x));
}

// Overloads, not a template: the arguments convert as in a call of a plain function.
#define MSL_SELECT(T)                          \
  MSL_INLINE T select(T x, T y, bool choose) { \
    return choose ? y : x;                     \
  }
MSL_SELECT(bool)
MSL_SELECT(char)
MSL_SELECT(uchar)
MSL_SELECT(short)
MSL_SELECT(ushort)
MSL_SELECT(int)
MSL_SELECT(uint)
MSL_SELECT(long)
MSL_SELECT(ulong)
MSL_SELECT(half)
MSL_SELECT(bfloat)
MSL_SELECT(float)
#undef MSL_SELECT
template <typename T, int N>
MSL_INLINE vec<T, N> select(vec<T, N> x, vec<T, N> y, msl_bool_vector<N> choose) {
  for (int i = 0; i < N; i++)
    x[i] = choose[i] ? y[i] : x[i];
  return x;
}
template <typename T, int N, typename B>
MSL_INLINE vec<T, N> select(vec<T, N> x, vec<T, N> y, vec<B, N> choose) {
  return select(x, y, msl_bool_vector<N>(choose));
}
}  // namespace metal
