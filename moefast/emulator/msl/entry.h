// How a launch reaches a kernel: arguments that convert to what the kernel declares, and a table of
// the declared types, so that no one but the compiler has to understand them.

struct msl_argument {
  size_t address;
  template <typename T>
  operator device T*() const {
    return (device T*)address;
  }
  template <typename T>
  operator constant T*() const {
    return (constant T*)address;
  }
  template <typename T>
  operator threadgroup T*() const {
    return (threadgroup T*)address;
  }
};
template <typename P>
struct msl_pass {
  static MSL_INLINE P from(size_t address) { return msl_argument{address}; }
};
template <typename T>
struct msl_pass<device T&> {
  static MSL_INLINE device T& from(size_t address) { return *(device T*)address; }
};
template <typename T>
struct msl_pass<constant T&> {
  static MSL_INLINE constant T& from(size_t address) { return *(constant T*)address; }
};
template <typename T>
struct msl_pass<threadgroup T&> {
  static MSL_INLINE threadgroup T& from(size_t address) { return *(threadgroup T*)address; }
};

// A position or size of the launch, as the kernel's parameter wants it: uint or ushort, of 1 to 3
// components.
template <typename P>
struct msl_builtin {
  static MSL_INLINE P from(uint4 v) { return (P)v.x; }
};
template <typename T>
struct msl_builtin<T __attribute__((ext_vector_type(2)))> {
  static MSL_INLINE vec<T, 2> from(uint4 v) { return msl_make<vec<T, 2>>((T)v.x, (T)v.y); }
};
template <typename T>
struct msl_builtin<T __attribute__((ext_vector_type(3)))> {
  static MSL_INLINE vec<T, 3> from(uint4 v) { return msl_make<vec<T, 3>>((T)v.x, (T)v.y, (T)v.z); }
};

// For each parameter: bytes and alignment of what it points to, whether it may be written, its
// address space (0 by value, 1 device, 2 constant, 3 threadgroup).
template <typename T>
struct msl_size_of {
  static constexpr constant uint size = sizeof(T), alignment = alignof(T);
};
template <>
struct msl_size_of<void> {
  static constexpr constant uint size = 1, alignment = 1;
};
template <>
struct msl_size_of<const void> {
  static constexpr constant uint size = 1, alignment = 1;
};
template <typename P>
struct msl_parameter {
  static constexpr constant uint size = sizeof(P), alignment = alignof(P), writable = 0, space = 0;
};
#define MSL_PARAMETER(SPACE, WRITABLE, NUMBER)                            \
  template <typename T>                                                   \
  struct msl_parameter<SPACE T*> {                                        \
    static constexpr constant uint size = msl_size_of<T>::size,           \
                                   alignment = msl_size_of<T>::alignment; \
    static constexpr constant uint writable = WRITABLE, space = NUMBER;   \
  };                                                                      \
  template <typename T>                                                   \
  struct msl_parameter<SPACE T&> : msl_parameter<SPACE T*> {};
MSL_PARAMETER(device, !metal::is_const_v<T>, 1)
MSL_PARAMETER(constant, 0, 2)
MSL_PARAMETER(threadgroup, 1, 3)
#undef MSL_PARAMETER

template <typename F>
struct msl_signature;
template <typename... P>
struct msl_signature<void(P...)> {
  static constexpr constant int count = sizeof...(P);
  struct table {
    uint value[sizeof...(P) * 4 + 1];
  };
  static constexpr table types() {
    table t = {};
    uint sizes[] = {msl_parameter<P>::size..., 0},
         alignments[] = {msl_parameter<P>::alignment..., 0};
    uint writable[] = {msl_parameter<P>::writable..., 0},
         spaces[] = {msl_parameter<P>::space..., 0};
    for (int i = 0; i < count; i++) {
      t.value[4 * i] = sizes[i];
      t.value[4 * i + 1] = alignments[i];
      t.value[4 * i + 2] = writable[i];
      t.value[4 * i + 3] = spaces[i];
    }
    return t;
  }
};
template <typename F, int I>
struct msl_type_of;
template <typename... P, int I>
struct msl_type_of<void(P...), I> {
  // The compiler's own look-up: a class for each step to a kernel's twentieth parameter takes long.
  typedef __type_pack_element<I, P...> type;
};
