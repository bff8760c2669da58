// Atomic functions, in device and threadgroup memory.
namespace metal {

// What takes the order of an operation: any but relaxed is refused, as by Metal's own headers.
struct msl_relaxed {
  msl_relaxed(memory_order order)
      __attribute__((diagnose_if(order != memory_order_relaxed,
                                 "the order of an atomic operation must be memory_order_relaxed",
                                 "error"))) {}
};

template <typename T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, ulong> ||
                    is_same_v<T, float> || is_same_v<T, bool>,
                "atomic<T> is for int, uint, ulong, float and bool");
  atomic() = default;
  atomic(const atomic&) = delete;
  T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define MSL_FETCH(SPACE, T, name, builtin)                                           \
  MSL_INLINE T atomic_fetch_##name##_explicit(volatile SPACE atomic<T>* at, T value, \
                                              msl_relaxed) {                         \
    return builtin(&at->msl_value, value, __ATOMIC_RELAXED);                         \
  }
#define MSL_FETCH_INTEGER(SPACE, T)            \
  MSL_FETCH(SPACE, T, add, __atomic_fetch_add) \
  MSL_FETCH(SPACE, T, sub, __atomic_fetch_sub) \
  MSL_FETCH(SPACE, T, and, __atomic_fetch_and) \
  MSL_FETCH(SPACE, T, or, __atomic_fetch_or)   \
  MSL_FETCH(SPACE, T, xor, __atomic_fetch_xor) \
  MSL_FETCH(SPACE, T, min, __atomic_fetch_min) \
  MSL_FETCH(SPACE, T, max, __atomic_fetch_max)
#define MSL_EXCHANGE(SPACE, T, Bits)                                                          \
  MSL_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* at, msl_relaxed) {        \
    return as_type<T>(                                                                        \
        __atomic_load_n((const volatile SPACE Bits*)&at->msl_value, __ATOMIC_RELAXED));       \
  }                                                                                           \
  MSL_INLINE void atomic_store_explicit(volatile SPACE atomic<T>* at, T value, msl_relaxed) { \
    __atomic_store_n((volatile SPACE Bits*)&at->msl_value, as_type<Bits>(value),              \
                     __ATOMIC_RELAXED);                                                       \
  }                                                                                           \
  MSL_INLINE T atomic_exchange_explicit(volatile SPACE atomic<T>* at, T value, msl_relaxed) { \
    return as_type<T>(__atomic_exchange_n((volatile SPACE Bits*)&at->msl_value,               \
                                          as_type<Bits>(value), __ATOMIC_RELAXED));           \
  }                                                                                           \
  MSL_INLINE bool atomic_compare_exchange_weak_explicit(                                      \
      volatile SPACE atomic<T>* at, thread T* expected, T value, msl_relaxed, msl_relaxed) {  \
    Bits found = as_type<Bits>(*expected);                                                    \
    bool same = __atomic_compare_exchange_n((volatile SPACE Bits*)&at->msl_value, &found,     \
                                            as_type<Bits>(value), true, __ATOMIC_RELAXED,     \
                                            __ATOMIC_RELAXED);                                \
    *expected = as_type<T>(found);                                                            \
    return same;                                                                              \
  }
#define MSL_ATOMICS(SPACE)                                                           \
  MSL_EXCHANGE(SPACE, int, uint)                                                     \
  MSL_EXCHANGE(SPACE, uint, uint)                                                    \
  MSL_EXCHANGE(SPACE, ulong, ulong)                                                  \
  MSL_EXCHANGE(SPACE, float, uint)                                                   \
  MSL_EXCHANGE(SPACE, bool, uchar)                                                   \
  MSL_FETCH_INTEGER(SPACE, int)                                                      \
  MSL_FETCH_INTEGER(SPACE, uint)                                                     \
  MSL_FETCH(SPACE, float, add, __atomic_fetch_add)                                   \
  MSL_FETCH(SPACE, float, sub, __atomic_fetch_sub)                                   \
  MSL_INLINE void atomic_min_explicit(volatile SPACE atomic<ulong>* at, ulong value, \
                                      msl_relaxed) {                                 \
    __atomic_fetch_min(&at->msl_value, value, __ATOMIC_RELAXED);                     \
  }                                                                                  \
  MSL_INLINE void atomic_max_explicit(volatile SPACE atomic<ulong>* at, ulong value, \
                                      msl_relaxed) {                                 \
    __atomic_fetch_max(&at->msl_value, value, __ATOMIC_RELAXED);                     \
  }
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#undef MSL_FETCH
#undef MSL_FETCH_INTEGER
#undef MSL_EXCHANGE
#undef MSL_ATOMICS

MSL_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
}  // namespace metal
