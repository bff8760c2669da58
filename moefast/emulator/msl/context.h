// What kernels call in the runtime. runtime/abi.h is the other side.
// nomerge: two barriers in two branches stay two, or a divergence that the source has would be
// gone.
#define MSL_RUNTIME extern "C" __attribute__((convergent, nomerge))

struct msl_context {
#define MSL_BUILTIN(name, components) uint4 name;
#include "builtins.def"
#undef MSL_BUILTIN
};

// Where the lanes of a simdgroup meet: who takes part, what each brought, and the result once a
// lane has made it.
struct msl_exchange {
  uint mask;
  uint done;
  ulong reserved;
  uchar result[64];
  uchar lane[32][64];
};

enum msl_operation {
  msl_op_reduce,
  msl_op_prefix,
  msl_op_shuffle,
  msl_op_vote,
  msl_op_quad,
  msl_op_matrix_load,
  msl_op_matrix_multiply,
};

// The last argument of each is the place in the source; check mode fills it in (instrument.py).
MSL_RUNTIME thread msl_exchange* msl_simd_exchange(const thread void* value,
                                                   uint bytes,
                                                   uint operation,
                                                   uint site);
MSL_RUNTIME void msl_simd_barrier(uint flags, uint site);
MSL_RUNTIME void msl_threadgroup_barrier(uint flags, uint site);
MSL_RUNTIME size_t msl_threadgroup_variable(uint id, uint bytes, uint alignment, uint site);
extern "C" uint msl_lane() __attribute__((const));

template <typename T>
MSL_INLINE T msl_value(const thread msl_exchange* x, uint lane) {
  T value;
  __builtin_memcpy(&value, x->lane[lane & 31], sizeof(T));
  return value;
}
template <typename T>
MSL_INLINE const thread msl_exchange* msl_meet(T value, uint operation) {
  static_assert(sizeof(T) <= 64, "at most 64 bytes a lane");
  return msl_simd_exchange(&value, sizeof(T), operation, 0);
}
MSL_INLINE bool msl_active(const thread msl_exchange* x, uint lane) {
  return (x->mask >> (lane & 31)) & 1;
}

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
MSL_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a & (uint)b);
}
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};

MSL_INLINE void threadgroup_barrier(mem_flags flags) {
  msl_threadgroup_barrier((uint)flags, 0);
}
MSL_INLINE void threadgroup_barrier(mem_flags flags, thread_scope) {
  msl_threadgroup_barrier((uint)flags, 0);
}
MSL_INLINE void simdgroup_barrier(mem_flags flags) {
  msl_simd_barrier((uint)flags, 0);
}
}  // namespace metal
