// What `T(a)`, `(T)a` and `static_cast<T>(a)` are where T is a type of a template (conversions.py):
// it may be a vector, which the compiler's own cast would fill with the bits of another.

// The type by way of which an A becomes a T: A itself, but float between half and bfloat.
template <typename T, typename A>
struct msl_step {
  typedef A type;
};
template <>
struct msl_step<bfloat, half> {
  typedef float type;
};
template <>
struct msl_step<half, bfloat> {
  typedef float type;
};

template <typename T, typename A>
MSL_INLINE constexpr T msl_convert(A a) {
  if constexpr (msl_vector_of<T>::lanes != 0)
    return msl_make<T>(a);
  else if constexpr (metal::is_same_v<typename msl_step<T, A>::type, A>)
    return (T)a;
  else
    return (T)(typename msl_step<T, A>::type)a;
}
template <typename T, typename A, typename B, typename... Rest>
MSL_INLINE constexpr T msl_convert(A a, B b, Rest... rest) {
  if constexpr (msl_vector_of<T>::lanes != 0)
    return msl_make<T>(a, b, rest...);
  else
    return T(a, b, rest...);
}
template <typename T>
MSL_INLINE constexpr T msl_convert() {
  return T();
}

// `T(a * b)` beside a sum: a plain cast of a number, for the product to be fused with the sum; of a
// vector, something that converts to it.
template <typename T>
struct msl_made {
  T value;
  template <typename... A>
  msl_made(A... a) : value(msl_make<T>(a...)) {}
  operator T() const { return value; }
};
#define MSL_SUM(op)                                        \
  template <typename T>                                    \
  MSL_INLINE T operator op(T a, msl_made<T> b) {           \
    return a op b.value;                                   \
  }                                                        \
  template <typename T>                                    \
  MSL_INLINE T operator op(msl_made<T> a, T b) {           \
    return a.value op b;                                   \
  }                                                        \
  template <typename T>                                    \
  MSL_INLINE T operator op(msl_made<T> a, msl_made<T> b) { \
    return a.value op b.value;                             \
  }                                                        \
  template <typename V, typename T>                        \
  MSL_INLINE V& operator op## = (V & a, msl_made<T> b) {   \
    return a op## = b.value;                               \
  }
MSL_SUM(+)
MSL_SUM(-)
#undef MSL_SUM
template <typename T>
using msl_cast = metal::conditional_t<msl_vector_of<T>::lanes == 0, T, msl_made<T>>;

// A scalar beside a vector of type V: one of its elements, as wide as they are (repair.py).
template <typename V, typename S>
MSL_INLINE constexpr auto msl_scalar_for(S s) {
  typedef metal::decay_t<V> Vector;
  if constexpr (msl_vector_of<Vector>::lanes == 0 || msl_vector_of<S>::lanes != 0) {
    return s;
  } else {
    typedef typename msl_vector_of<Vector>::element Element;
    static_assert(!metal::is_same_v<Element, bfloat> || metal::is_integral_v<S> ||
                      metal::is_same_v<S, bfloat>,
                  "a float becomes a bfloat only by bfloat(x)");
    static_assert(metal::is_floating_point_v<Element> || !metal::is_floating_point_v<S>,
                  "a float does not become an element of a vector of integers by itself");
    return (Element)s;
  }
}
