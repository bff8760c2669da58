// Type traits and numeric limits.
namespace metal {

template <typename T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, typename T, typename U>
struct conditional {
  typedef T type;
};
template <typename T, typename U>
struct conditional<false, T, U> {
  typedef U type;
};
template <bool B, typename T, typename U>
using conditional_t = typename conditional<B, T, U>::type;

template <typename... B>
struct _disjunction : false_type {};
template <typename A, typename... B>
struct _disjunction<A, B...> : bool_constant<A::value || _disjunction<B...>::value> {};
template <typename... B>
using disjunction = _disjunction<B...>;
template <typename... B>
struct _conjunction : true_type {};
template <typename A, typename... B>
struct _conjunction<A, B...> : bool_constant<A::value && _conjunction<B...>::value> {};
template <typename... B>
using conjunction = _conjunction<B...>;

template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};
template <typename T, typename U>
constexpr constant bool is_same_v = is_same<T, U>::value;

template <typename T>
struct remove_addrspace {
  typedef T type;
};
template <typename T>
struct remove_addrspace<thread T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<device T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<constant T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <typename T>
struct remove_const {
  typedef T type;
};
template <typename T>
struct remove_const<const T> {
  typedef T type;
};
template <typename T>
using remove_const_t = typename remove_const<T>::type;
template <typename T>
struct remove_volatile {
  typedef T type;
};
template <typename T>
struct remove_volatile<volatile T> {
  typedef T type;
};
template <typename T>
using remove_volatile_t = typename remove_volatile<T>::type;
// In Metal cv qualifiers go together with the address space of a variable's type.
template <typename T>
struct remove_cv {
  typedef remove_const_t<remove_volatile_t<T>> bare;
  typedef remove_const_t<remove_volatile_t<remove_addrspace_t<bare>>> type;
};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;

template <typename T>
struct remove_reference {
  typedef T type;
};
template <typename T>
struct remove_reference<T&> {
  typedef T type;
};
template <typename T>
struct remove_reference<T&&> {
  typedef T type;
};
template <typename T>
using remove_reference_t = typename remove_reference<T>::type;
template <typename T>
struct decay {
  typedef remove_cv_t<remove_reference_t<T>> type;
};
template <typename T>
using decay_t = typename decay<T>::type;

template <typename T>
struct msl_is_integral : false_type {};
template <typename T>
struct msl_is_float : false_type {};
#define MSL_IS(trait, T) \
  template <>            \
  struct trait<T> : true_type {};
MSL_IS(msl_is_integral, bool)
MSL_IS(msl_is_integral, char)
MSL_IS(msl_is_integral, signed char)
MSL_IS(msl_is_integral, uchar)
MSL_IS(msl_is_integral, short)
MSL_IS(msl_is_integral, ushort)
MSL_IS(msl_is_integral, int)
MSL_IS(msl_is_integral, uint)
MSL_IS(msl_is_integral, long)
MSL_IS(msl_is_integral, ulong)
MSL_IS(msl_is_float, half)
MSL_IS(msl_is_float, bfloat)
MSL_IS(msl_is_float, float)
#undef MSL_IS

template <typename T>
struct is_integral : bool_constant<msl_is_integral<remove_cv_t<T>>::value> {};
template <typename T>
struct is_floating_point : bool_constant<msl_is_float<remove_cv_t<T>>::value> {};
template <typename T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <typename T>
struct is_unsigned : bool_constant<__is_unsigned(remove_cv_t<T>)> {};
template <typename T>
struct is_signed : bool_constant<is_arithmetic<T>::value && !is_unsigned<T>::value> {};
template <typename T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <typename T>
struct is_class : bool_constant<__is_class(T)> {};
template <typename T>
struct is_pointer : bool_constant<__is_pointer(T)> {};
template <typename T>
struct is_const : false_type {};
template <typename T>
struct is_const<const T> : true_type {};
template <typename T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <typename F, typename T>
struct is_convertible : bool_constant<__is_convertible(F, T)> {};
template <typename T, typename... A>
struct is_constructible : bool_constant<__is_constructible(T, A...)> {};
template <typename B, typename D>
struct is_base_of : bool_constant<__is_base_of(B, D)> {};
template <typename T>
struct is_trivially_copyable : bool_constant<__is_trivially_copyable(T)> {};

template <typename T>
constexpr constant bool is_integral_v = is_integral<T>::value;
template <typename T>
constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <typename T>
constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <typename T>
constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <typename T>
constexpr constant bool is_signed_v = is_signed<T>::value;
template <typename T>
constexpr constant bool is_enum_v = is_enum<T>::value;
template <typename T>
constexpr constant bool is_class_v = is_class<T>::value;
template <typename T>
constexpr constant bool is_pointer_v = is_pointer<T>::value;
template <typename T>
constexpr constant bool is_const_v = is_const<T>::value;
template <typename T>
constexpr constant bool is_void_v = is_void<T>::value;
template <typename F, typename T>
constexpr constant bool is_convertible_v = is_convertible<F, T>::value;
template <typename B, typename D>
constexpr constant bool is_base_of_v = is_base_of<B, D>::value;

template <typename T>
struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <typename T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <typename T>
struct make_signed {
  typedef __make_signed(T) type;
};
template <typename T>
using make_signed_t = typename make_signed<T>::type;

template <typename T, size_t N>
struct array {
  array() = default;
  MSL_COPIES(array)
  T __elems_[N];
  constexpr size_t size() const { return N; }
  T& operator[](size_t i) { return __elems_[i]; }
  const T& operator[](size_t i) const { return __elems_[i]; }
  thread T& operator[](size_t i) thread { return __elems_[i]; }
  const thread T& operator[](size_t i) const thread { return __elems_[i]; }
  device T& operator[](size_t i) device { return __elems_[i]; }
  const device T& operator[](size_t i) const device { return __elems_[i]; }
  threadgroup T& operator[](size_t i) threadgroup { return __elems_[i]; }
  const threadgroup T& operator[](size_t i) const threadgroup { return __elems_[i]; }
  const constant T& operator[](size_t i) const constant { return __elems_[i]; }
};

template <typename T>
using uniform = T;
template <typename T>
MSL_INLINE constexpr T make_uniform(T x) {
  return x;
}

template <typename T>
struct msl_integer_limits {
  static constexpr constant bool is_specialized = true, is_integer = true, is_exact = true;
  static constexpr constant bool is_signed = T(-1) < T(0);
  static constexpr constant bool has_infinity = false, has_quiet_NaN = false;
  static constexpr constant int digits = sizeof(T) * 8 - is_signed;
  static constexpr T min() { return is_signed ? T(1ul << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
  static constexpr T epsilon() { return 0; }
  static constexpr T infinity() { return 0; }
  static constexpr T quiet_NaN() { return 0; }
};
// The name under which Apple's headers, and some kernels, specialise it.
template <typename T>
struct _numeric_limits_impl {};
template <typename T>
struct numeric_limits : _numeric_limits_impl<T> {};
#define MSL_LIMITS(T) \
  template <>         \
  struct _numeric_limits_impl<T> : msl_integer_limits<T> {};
MSL_LIMITS(char)
MSL_LIMITS(signed char)
MSL_LIMITS(uchar)
MSL_LIMITS(short)
MSL_LIMITS(ushort)
MSL_LIMITS(int)
MSL_LIMITS(uint)
MSL_LIMITS(long)
MSL_LIMITS(ulong)
#undef MSL_LIMITS
template <>
struct _numeric_limits_impl<bool> {
  static constexpr constant bool is_specialized = true, is_integer = true, is_signed = false;
  static constexpr constant bool has_infinity = false, has_quiet_NaN = false;
  static constexpr constant int digits = 1;
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
  static constexpr bool lowest() { return false; }
};
#define MSL_LIMITS(T, DIGITS, MIN, MAX, EPSILON)                              \
  template <>                                                                 \
  struct _numeric_limits_impl<T> {                                            \
    static constexpr constant bool is_specialized = true, is_integer = false; \
    static constexpr constant bool is_signed = true, is_exact = false;        \
    static constexpr constant bool has_infinity = true, has_quiet_NaN = true; \
    static constexpr constant int digits = DIGITS;                            \
    static constexpr T min() { return (T)MIN; }                               \
    static constexpr T max() { return (T)MAX; }                               \
    static constexpr T lowest() { return (T) - MAX; }                         \
    static constexpr T epsilon() { return (T)EPSILON; }                       \
    static constexpr T infinity() { return (T)__builtin_inff(); }             \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }          \
  };
MSL_LIMITS(float, 24, 1.175494351e-38f, 3.402823466e+38f, 1.1920928955e-7f)
MSL_LIMITS(half, 11, 6.103515625e-5f, 65504.0f, 9.765625e-4f)
MSL_LIMITS(bfloat, 8, 1.175494351e-38f, 3.38953139e+38f, 7.8125e-3f)
#undef MSL_LIMITS

}  // namespace metal
