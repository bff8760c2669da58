// Address spaces, scalars and vectors of the Metal Shading Language, said in C++ for OpenCL.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_bitfields : enable
// For functions as template arguments; strict.py refuses other pointers to them.
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define kernel

// Words of OpenCL that are plain names in Metal.
#define local msl_name_local
#define global msl_name_global
#define private_ msl_name_private
#define generic msl_name_generic
#define read_only msl_name_read_only
#define write_only msl_name_write_only
#define read_write msl_name_read_write
#define pipe msl_name_pipe
#define event_t msl_name_event_t
#define queue_t msl_name_queue_t
#define clk_event_t msl_name_clk_event_t
#define reserve_id_t msl_name_reserve_id_t
// OpenCL's own atomic types, which the compiler declares.
#define atomic_int msl_name_atomic_int
#define atomic_uint msl_name_atomic_uint
#define atomic_long msl_name_atomic_long
#define atomic_ulong msl_name_atomic_ulong
#define atomic_float msl_name_atomic_float
#define atomic_flag msl_name_atomic_flag
#define atomic_size_t msl_name_atomic_size_t

#define MSL_INLINE inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __bf16 bfloat;

namespace metal {
// An alias of the compiler's vectors, so that `vec<T, N>` is deduced and swizzles are the
// compiler's.
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}  // namespace metal
using metal::vec;

#define MSL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS

// As a member of a class of vectors: copies from constant memory, as from any other. The assignment
// is a template, for `v = {1, 2}` to mean one of the two.
#define MSL_COPIES(name)                                                             \
  name(const name&) = default;                                                       \
  name(const constant name&) = default;                                              \
  name& operator=(const name&) = default;                                            \
  template <typename msl_other, typename = typename msl_only<name, msl_other>::type> \
  name& operator=(const constant msl_other& other) {                                 \
    return *this = name(other);                                                      \
  }
template <typename T, typename U>
struct msl_only {};
template <typename T>
struct msl_only<T, T> {
  typedef T type;
};

// The lanes of a vector that is a class here.
template <typename T, int N>
struct msl_lanes {
  T lane[N];
  msl_lanes() = default;
  MSL_COPIES(msl_lanes)
};
// The lanes, and as properties the components and swizzles that the source uses: swizzles.py
// defines it, before the source.
template <typename T, int N>
struct msl_swizzled;

// The compiler has no vectors of bool; comparisons of vectors give vectors of integers, 0 or -1.
template <int N>
struct msl_bool_vector : msl_swizzled<bool, N> {
  using msl_swizzled<bool, N>::lane;
  msl_bool_vector() = default;
  MSL_COPIES(msl_bool_vector)
  msl_bool_vector(bool b) {
    for (int i = 0; i < N; i++)
      lane[i] = b;
  }
  template <typename T>
  msl_bool_vector(metal::vec<T, N> v) {
    for (int i = 0; i < N; i++)
      lane[i] = v[i] != 0;
  }
  template <typename... B>
  msl_bool_vector(bool a, bool b, B... rest) {
    static_assert(sizeof...(rest) + 2 == N, "a bool vector takes one value, or one for each lane");
    bool given[] = {a, b, (bool)rest...};
    for (int i = 0; i < N; i++)
      lane[i] = given[i];
  }
  thread bool& operator[](int i) thread { return lane[i]; }
  bool& operator[](int i) { return lane[i]; }
  bool operator[](int i) const { return lane[i]; }
  bool operator[](int i) const constant { return lane[i]; }
  msl_bool_vector operator!() const {
    msl_bool_vector r;
    for (int i = 0; i < N; i++)
      r.lane[i] = !lane[i];
    return r;
  }
};
#define MSL_BOOL_OPERATOR(op)                                                             \
  template <int N>                                                                        \
  MSL_INLINE msl_bool_vector<N> operator op(msl_bool_vector<N> a, msl_bool_vector<N> b) { \
    msl_bool_vector<N> r;                                                                 \
    for (int i = 0; i < N; i++)                                                           \
      r.lane[i] = a.lane[i] op b.lane[i];                                                 \
    return r;                                                                             \
  }                                                                                       \
  template <typename T, int N>                                                            \
  MSL_INLINE msl_bool_vector<N> operator op(msl_bool_vector<N> a, metal::vec<T, N> b) {   \
    return a op msl_bool_vector<N>(b);                                                    \
  }                                                                                       \
  template <typename T, int N>                                                            \
  MSL_INLINE msl_bool_vector<N> operator op(metal::vec<T, N> a, msl_bool_vector<N> b) {   \
    return msl_bool_vector<N>(a) op b;                                                    \
  }
MSL_BOOL_OPERATOR(&&)
MSL_BOOL_OPERATOR(||)
MSL_BOOL_OPERATOR(&)
MSL_BOOL_OPERATOR(|)
MSL_BOOL_OPERATOR(^)
MSL_BOOL_OPERATOR(==)
MSL_BOOL_OPERATOR(!=)
#undef MSL_BOOL_OPERATOR
typedef msl_bool_vector<2> bool2;
typedef msl_bool_vector<3> bool3;
typedef msl_bool_vector<4> bool4;

namespace metal {
#define MSL_ALSO_METAL(T) \
  using ::T##2;           \
  using ::T##3;           \
  using ::T##4;
MSL_ALSO_METAL(char)
MSL_ALSO_METAL(uchar)
MSL_ALSO_METAL(short)
MSL_ALSO_METAL(ushort)
MSL_ALSO_METAL(int)
MSL_ALSO_METAL(uint)
MSL_ALSO_METAL(long)
MSL_ALSO_METAL(ulong)
MSL_ALSO_METAL(half)
MSL_ALSO_METAL(bfloat)
MSL_ALSO_METAL(float)
MSL_ALSO_METAL(bool)
#undef MSL_ALSO_METAL
using ::bfloat;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;
}  // namespace metal

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF INFINITY
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920928955e-7f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-5f)
#define HALF_EPSILON ((half)9.765625e-4f)
#define MAXHALF HALF_MAX
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define CHAR_BIT 8
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define UCHAR_MAX 255
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_PI_H ((half)M_PI_F)
