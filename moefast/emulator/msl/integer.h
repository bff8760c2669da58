// Integer functions, and min, max, clamp, abs of vectors of any number.
namespace metal {

template <typename T>
struct msl_wide;
template <>
struct msl_wide<char> {
  typedef int type;
};
template <>
struct msl_wide<uchar> {
  typedef uint type;
};
template <>
struct msl_wide<short> {
  typedef int type;
};
template <>
struct msl_wide<ushort> {
  typedef uint type;
};
template <>
struct msl_wide<int> {
  typedef long type;
};
template <>
struct msl_wide<uint> {
  typedef ulong type;
};
template <>
struct msl_wide<long> {
  typedef __int128 type;
};
template <>
struct msl_wide<ulong> {
  typedef unsigned __int128 type;
};

#define MSL_INTEGER(T, U)                                                                     \
  MSL_INLINE T min(T x, T y) {                                                                \
    return y < x ? y : x;                                                                     \
  }                                                                                           \
  MSL_INLINE T max(T x, T y) {                                                                \
    return x < y ? y : x;                                                                     \
  }                                                                                           \
  MSL_INLINE T clamp(T x, T low, T high) {                                                    \
    return min(max(x, low), high);                                                            \
  }                                                                                           \
  MSL_INLINE T min3(T x, T y, T z) {                                                          \
    return min(x, min(y, z));                                                                 \
  }                                                                                           \
  MSL_INLINE T max3(T x, T y, T z) {                                                          \
    return max(x, max(y, z));                                                                 \
  }                                                                                           \
  MSL_INLINE T median3(T x, T y, T z) {                                                       \
    return max(min(x, y), min(max(x, y), z));                                                 \
  }                                                                                           \
  MSL_INLINE T abs(T x) {                                                                     \
    return x < (T)0 ? (T)(0 - x) : x;                                                         \
  }                                                                                           \
  MSL_INLINE U absdiff(T x, T y) {                                                            \
    return x < y ? (U)((U)y - (U)x) : (U)((U)x - (U)y);                                       \
  }                                                                                           \
  MSL_INLINE T addsat(T x, T y) {                                                             \
    T r;                                                                                      \
    if (!__builtin_add_overflow(x, y, &r))                                                    \
      return r;                                                                               \
    return y < (T)0 ? numeric_limits<T>::min() : numeric_limits<T>::max();                    \
  }                                                                                           \
  MSL_INLINE T subsat(T x, T y) {                                                             \
    T r;                                                                                      \
    if (!__builtin_sub_overflow(x, y, &r))                                                    \
      return r;                                                                               \
    return x < y ? numeric_limits<T>::min() : numeric_limits<T>::max();                       \
  }                                                                                           \
  MSL_INLINE T hadd(T x, T y) {                                                               \
    return (T)(((msl_wide<T>::type)x + y) >> 1);                                              \
  }                                                                                           \
  MSL_INLINE T rhadd(T x, T y) {                                                              \
    return (T)(((msl_wide<T>::type)x + y + 1) >> 1);                                          \
  }                                                                                           \
  MSL_INLINE T mulhi(T x, T y) {                                                              \
    return (T)(((msl_wide<T>::type)x * y) >> (sizeof(T) * 8));                                \
  }                                                                                           \
  MSL_INLINE T madhi(T x, T y, T z) {                                                         \
    return (T)(mulhi(x, y) + z);                                                              \
  }                                                                                           \
  MSL_INLINE T madsat(T x, T y, T z) {                                                        \
    msl_wide<T>::type r = (msl_wide<T>::type)x * y + z;                                       \
    if (r < (msl_wide<T>::type)numeric_limits<T>::min())                                      \
      return numeric_limits<T>::min();                                                        \
    return r > (msl_wide<T>::type)numeric_limits<T>::max() ? numeric_limits<T>::max() : (T)r; \
  }                                                                                           \
  MSL_INLINE T popcount(T x) {                                                                \
    return (T)__builtin_popcountl((ulong)(U)x);                                               \
  }                                                                                           \
  MSL_INLINE T clz(T x) {                                                                     \
    return (U)x ? (T)(__builtin_clzl((ulong)(U)x) - (64 - (int)sizeof(T) * 8))                \
                : (T)(sizeof(T) * 8);                                                         \
  }                                                                                           \
  MSL_INLINE T ctz(T x) {                                                                     \
    return (U)x ? (T)__builtin_ctzl((ulong)(U)x) : (T)(sizeof(T) * 8);                        \
  }                                                                                           \
  MSL_INLINE T reverse_bits(T x) {                                                            \
    return (T)(U)(__builtin_bitreverse64((ulong)(U)x) >> (64 - sizeof(T) * 8));               \
  }                                                                                           \
  MSL_INLINE T rotate(T x, T by) {                                                            \
    uint n = (uint)by & (sizeof(T) * 8 - 1);                                                  \
    return n ? (T)(((U)x << n) | ((U)x >> (sizeof(T) * 8 - n))) : x;                          \
  }                                                                                           \
  MSL_INLINE T extract_bits(T x, uint at, uint count) {                                       \
    if (count == 0)                                                                           \
      return 0;                                                                               \
    uint rest = sizeof(T) * 8 - count;                                                        \
    return (T)((T)((U)x << (rest - at)) >> rest);                                             \
  }                                                                                           \
  MSL_INLINE T insert_bits(T x, T bits, uint at, uint count) {                                \
    if (count == 0)                                                                           \
      return x;                                                                               \
    U mask = (U)((U)(~(U)0 >> (sizeof(T) * 8 - count)) << at);                                \
    return (T)(((U)x & ~mask) | (((U)bits << at) & mask));                                    \
  }
MSL_INTEGER(char, uchar)
MSL_INTEGER(uchar, uchar)
MSL_INTEGER(short, ushort)
MSL_INTEGER(ushort, ushort)
MSL_INTEGER(int, uint)
MSL_INTEGER(uint, uint)
MSL_INTEGER(long, ulong)
MSL_INTEGER(ulong, ulong)
#undef MSL_INTEGER

MSL_INLINE int mul24(int x, int y) {
  return ((x << 8) >> 8) * ((y << 8) >> 8);
}
MSL_INLINE uint mul24(uint x, uint y) {
  return (x & 0xffffff) * (y & 0xffffff);
}
MSL_INLINE int mad24(int x, int y, int z) {
  return mul24(x, y) + z;
}
MSL_INLINE uint mad24(uint x, uint y, uint z) {
  return mul24(x, y) + z;
}

MSL_LANES_1(abs)
MSL_LANES_1(clz)
MSL_LANES_1(ctz)
MSL_LANES_1(popcount)
MSL_LANES_1(reverse_bits)
MSL_LANES_2(addsat)
MSL_LANES_2(subsat)
MSL_LANES_2(hadd)
MSL_LANES_2(rhadd)
MSL_LANES_2(mulhi)
MSL_LANES_2(rotate)
MSL_LANES_2(min)
MSL_LANES_2(max)
MSL_LANES_3(clamp)
MSL_LANES_3(min3)
MSL_LANES_3(max3)
MSL_LANES_3(median3)
MSL_LANES_3(madhi)
MSL_LANES_3(madsat)
template <typename T, int N>
MSL_INLINE vec<T, N> extract_bits(vec<T, N> x, uint at, uint count) {
  for (int i = 0; i < N; i++)
    x[i] = extract_bits((T)x[i], at, count);
  return x;
}
template <typename T, int N>
MSL_INLINE vec<T, N> insert_bits(vec<T, N> x, vec<T, N> bits, uint at, uint count) {
  for (int i = 0; i < N; i++)
    x[i] = insert_bits((T)x[i], (T)bits[i], at, count);
  return x;
}

#undef MSL_LANES_1
#undef MSL_LANES_2
#undef MSL_LANES_3
}  // namespace metal
