// Constructing vectors, packed vectors and as_type.
//
// `float4(a, b)` is no C++ for the compiler's own vectors; before compiling, such calls are written
// `msl_make<float4>(a, b)` (translate.py).

template <typename V>
struct msl_vector_of {
  static constexpr constant int lanes = 0;
  typedef V element;
};
template <typename T, int N>
struct msl_vector_of<T __attribute__((ext_vector_type(N)))> {
  static constexpr constant int lanes = N;
  typedef T element;
};
template <int N>
struct msl_vector_of<msl_bool_vector<N>> {
  static constexpr constant int lanes = N;
  typedef bool element;
};

// A component or a swizzle of a class of vectors, as a property: components `...` of `lane`, K of
// them.
template <typename T, int K>
struct msl_vector_for {
  typedef metal::vec<T, K> type;
};
template <int K>
struct msl_vector_for<bool, K> {
  typedef msl_bool_vector<K> type;
};
#define MSL_SWIZZLE_GET(name, K, SPACE, ...)                         \
  typename msl_vector_for<T, K>::type msl_get_##name() const SPACE { \
    const int at[] = {__VA_ARGS__};                                  \
    typename msl_vector_for<T, K>::type v;                           \
    for (int i = 0; i < K; i++)                                      \
      v[i] = this->lane[at[i]];                                      \
    return v;                                                        \
  }
#define MSL_COMPONENT(name, at)       \
  T msl_get_##name() const {          \
    return this->lane[at];            \
  }                                   \
  T msl_get_##name() const constant { \
    return this->lane[at];            \
  }                                   \
  void msl_put_##name(T value) {      \
    this->lane[at] = value;           \
  }                                   \
  __declspec(property(get = msl_get_##name, put = msl_put_##name)) T name;
#define MSL_READ_SWIZZLE(name, K, ...)            \
  MSL_SWIZZLE_GET(name, K, , __VA_ARGS__)         \
  MSL_SWIZZLE_GET(name, K, constant, __VA_ARGS__) \
  __declspec(property(get = msl_get_##name)) typename msl_vector_for<T, K>::type name;
#define MSL_SWIZZLE(name, K, ...)                                  \
  MSL_SWIZZLE_GET(name, K, , __VA_ARGS__)                          \
  MSL_SWIZZLE_GET(name, K, constant, __VA_ARGS__)                  \
  void msl_put_##name(typename msl_vector_for<T, K>::type v) {     \
    const int at[] = {__VA_ARGS__};                                \
    for (int i = 0; i < K; i++)                                    \
      this->lane[at[i]] = v[i];                                    \
  }                                                                \
  __declspec(property(get = msl_get_##name, put = msl_put_##name)) \
  typename msl_vector_for<T, K>::type name;

// Packed vectors have the alignment of their elements, and are arithmetic through the vector they
// convert to.
template <typename T, int N>
struct msl_packed : msl_swizzled<T, N> {
  using msl_swizzled<T, N>::lane;
  msl_packed() = default;
  MSL_COPIES(msl_packed)
  msl_packed(metal::vec<T, N> v) {
    for (int i = 0; i < N; i++)
      lane[i] = v[i];
  }
  template <typename... U>
  msl_packed(T a, T b, U... rest) {
    static_assert(sizeof...(rest) + 2 == N, "a packed vector takes one value for each lane");
    T given[] = {a, b, (T)rest...};
    for (int i = 0; i < N; i++)
      lane[i] = given[i];
  }
  operator metal::vec<T, N>() const {
    metal::vec<T, N> v;
    for (int i = 0; i < N; i++)
      v[i] = lane[i];
    return v;
  }
  operator metal::vec<T, N>() const constant {
    metal::vec<T, N> v;
    for (int i = 0; i < N; i++)
      v[i] = lane[i];
    return v;
  }
  device T& operator[](int i) device { return lane[i]; }
  const device T& operator[](int i) const device { return lane[i]; }
  threadgroup T& operator[](int i) threadgroup { return lane[i]; }
  const threadgroup T& operator[](int i) const threadgroup { return lane[i]; }
  const constant T& operator[](int i) const constant { return lane[i]; }
  thread T& operator[](int i) thread { return lane[i]; }
  const thread T& operator[](int i) const thread { return lane[i]; }
  T& operator[](int i) { return lane[i]; }
  T operator[](int i) const { return lane[i]; }
};
template <typename T, int N>
struct msl_vector_of<msl_packed<T, N>> {
  static constexpr constant int lanes = N;
  typedef T element;
};
template <typename T>
struct msl_same {
  typedef T type;
};
#define MSL_PACKED_OPERATOR(op)                                                   \
  template <typename T, int N>                                                    \
  MSL_INLINE auto operator op(msl_packed<T, N> a, msl_packed<T, N> b) {           \
    return (metal::vec<T, N>)a op(metal::vec<T, N>) b;                            \
  }                                                                               \
  template <typename T, int N>                                                    \
  MSL_INLINE auto operator op(msl_packed<T, N> a, metal::vec<T, N> b) {           \
    return (metal::vec<T, N>)a op b;                                              \
  }                                                                               \
  template <typename T, int N>                                                    \
  MSL_INLINE auto operator op(metal::vec<T, N> a, msl_packed<T, N> b) {           \
    return a op(metal::vec<T, N>) b;                                              \
  }                                                                               \
  template <typename T, int N>                                                    \
  MSL_INLINE auto operator op(msl_packed<T, N> a, typename msl_same<T>::type b) { \
    return (metal::vec<T, N>)a op b;                                              \
  }                                                                               \
  template <typename T, int N>                                                    \
  MSL_INLINE auto operator op(typename msl_same<T>::type a, msl_packed<T, N> b) { \
    return a op(metal::vec<T, N>) b;                                              \
  }
#define MSL_PACKED_ASSIGNMENT(op)                                            \
  MSL_PACKED_OPERATOR(op)                                                    \
  template <typename T, int N, typename B>                                   \
  MSL_INLINE msl_packed<T, N>& operator op## = (msl_packed<T, N> & a, B b) { \
    return a = (metal::vec<T, N>)a op b;                                     \
  }
#define MSL_PACKED_SIGN(op)                         \
  template <typename T, int N>                      \
  MSL_INLINE auto operator op(msl_packed<T, N> a) { \
    return op(metal::vec<T, N>) a;                  \
  }
// clang-format off
MSL_PACKED_ASSIGNMENT(+) MSL_PACKED_ASSIGNMENT(-) MSL_PACKED_ASSIGNMENT(*) MSL_PACKED_ASSIGNMENT(/)
MSL_PACKED_ASSIGNMENT(%) MSL_PACKED_ASSIGNMENT(&) MSL_PACKED_ASSIGNMENT(|) MSL_PACKED_ASSIGNMENT(^)
MSL_PACKED_ASSIGNMENT(<<) MSL_PACKED_ASSIGNMENT(>>)
MSL_PACKED_OPERATOR(==) MSL_PACKED_OPERATOR(!=)
MSL_PACKED_OPERATOR(<) MSL_PACKED_OPERATOR(>) MSL_PACKED_OPERATOR(<=) MSL_PACKED_OPERATOR(>=)
MSL_PACKED_SIGN(+) MSL_PACKED_SIGN(-) MSL_PACKED_SIGN(~) MSL_PACKED_SIGN(!)
// clang-format on
#undef MSL_PACKED_ASSIGNMENT
#undef MSL_PACKED_SIGN
#undef MSL_PACKED_OPERATOR
#define MSL_PACKED(T)                     \
  typedef msl_packed<T, 2> packed_##T##2; \
  typedef msl_packed<T, 3> packed_##T##3; \
  typedef msl_packed<T, 4> packed_##T##4;
                        MSL_PACKED(char) MSL_PACKED(uchar) MSL_PACKED(short) MSL_PACKED(ushort)
                            MSL_PACKED(int) MSL_PACKED(uint) MSL_PACKED(long) MSL_PACKED(ulong)
                                MSL_PACKED(half) MSL_PACKED(bfloat) MSL_PACKED(float)
#undef MSL_PACKED

                                    template <int AT, typename V>
                                    MSL_INLINE void msl_fill(thread V&) {
  static_assert(AT == msl_vector_of<V>::lanes,
                "a vector constructor needs one value, or one for every lane");
}
template <int AT, typename V, typename A, typename... Rest>
MSL_INLINE void msl_fill(thread V& v, A a, Rest... rest) {
  typedef typename msl_vector_of<V>::element E;
  constexpr int lanes = msl_vector_of<A>::lanes;
  static_assert(AT + (lanes ? lanes : 1) <= msl_vector_of<V>::lanes,
                "a vector constructor has more values than the vector has lanes");
  if constexpr (lanes == 0) {
    v[AT] = (E)a;
    msl_fill<AT + 1>(v, rest...);
  } else {
    for (int i = 0; i < lanes; i++)
      v[AT + i] = (E)a[i];
    msl_fill<AT + lanes>(v, rest...);
  }
}
template <typename V>
MSL_INLINE V msl_make() {
  V v;
  for (int i = 0; i < msl_vector_of<V>::lanes; i++)
    v[i] = 0;
  return v;
}
template <typename V, typename A>
MSL_INLINE V msl_make(A a) {
  typedef typename msl_vector_of<V>::element E;
  constexpr int lanes = msl_vector_of<A>::lanes;
  V v;
  if constexpr (lanes == 0) {
    for (int i = 0; i < msl_vector_of<V>::lanes; i++)
      v[i] = (E)a;
  } else {
    static_assert(lanes == msl_vector_of<V>::lanes,
                  "a vector converts only to one of as many lanes");
    for (int i = 0; i < lanes; i++)
      v[i] = (E)a[i];
  }
  return v;
}
template <typename V, typename A, typename B, typename... Rest>
MSL_INLINE V msl_make(A a, B b, Rest... rest) {
  V v;
  msl_fill<0>(v, a, b, rest...);
  return v;
}

// What a comparison gave, as bools: of vectors the compiler makes integers of all bits.
template <typename T>
MSL_INLINE T msl_truth(T x) {
  return x;
}
template <typename T, int N>
MSL_INLINE msl_bool_vector<N> msl_truth(vec<T, N> x) {
  return msl_bool_vector<N>(x);
}

// Half and bfloat convert into each other only by way of float; translate.py writes these for
// bfloat(x) and half(x).
template <typename T>
MSL_INLINE constexpr bfloat msl_to_bfloat(T x) {
  return (bfloat)x;
}
MSL_INLINE constexpr bfloat msl_to_bfloat(half x) {
  return (bfloat)(float)x;
}
MSL_INLINE constexpr bfloat msl_to_bfloat() {
  return (bfloat)0.0f;
}
template <typename T>
MSL_INLINE constexpr half msl_to_half(T x) {
  return (half)x;
}
MSL_INLINE constexpr half msl_to_half(bfloat x) {
  return (half)(float)x;
}
MSL_INLINE constexpr half msl_to_half() {
  return (half)0.0f;
}

namespace metal {
template <typename To, typename From>
MSL_INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace metal
using metal::as_type;

MSL_INLINE constexpr uint msl_larger(uint a, uint b) {
  return a > b ? a : b;
}
