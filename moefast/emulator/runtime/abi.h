// What the runtime shares with compiled kernels (msl/context.h) and with Python (launch.py,
// child.py).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMostThreads = 1024;
constexpr uint32_t kMostThreadgroupBytes = 32768;
constexpr uint32_t kBuffers = 31;
// Of a kernel's `arguments`: device and constant buffers first, then [[threadgroup(n)]].
constexpr uint32_t kArguments = 2 * kBuffers;

struct Vector {
  uint32_t x, y, z, w;
};

struct Context {
#define MSL_BUILTIN(name, components) Vector name;
#include "../msl/builtins.def"
#undef MSL_BUILTIN
};

struct Exchange {
  uint32_t mask, done;
  uint64_t reserved;
  uint8_t result[64];
  uint8_t lane[kLanes][64];
};

enum Operation : uint32_t {
  kReduce,
  kPrefix,
  kShuffle,
  kVote,
  kQuad,
  kMatrixLoad,
  kMatrixMultiply,
};

enum MemoryFlags : uint32_t { kDevice = 1, kThreadgroup = 2 };

typedef void (*Entry)(void** arguments, const Context* context);

// Filled by Python (ctypes, struct): only fixed-width fields, largest first.
struct Launch {
  uint64_t entry;      // Entry; in a child process, resolved there
  uint64_t arguments;  // void*[kArguments]
  uint64_t seed;
  double seconds;  // time limit
  uint32_t grid[3];
  uint32_t threadgroup[3];
  uint32_t threadgroup_bytes[kBuffers];  // of [[threadgroup(n)]]
  uint32_t shuffle;
  uint32_t os_threads;
  uint32_t meets;  // 0: the kernel has no barrier and no simd operation, a thread never waits
  uint32_t allow_equal_writes;  // check mode: unordered writes of the same bytes are no findings
  uint32_t flush;               // 1: operations take and give 0 for denormals of float and bfloat
};

enum Status : uint32_t {
  kFinished,
  kTimeLimit,
  kFault,             // detail: signal, address
  kThreadgroupBytes,  // detail: bytes asked for
  kStack,             // detail: bytes there are
};

struct Counts {
  uint64_t threads, threadgroups, barriers, simd_barriers, simd_operations, multiplies;
};

struct Outcome {
  uint64_t detail, address;
  Counts counts;
  uint32_t status;
  uint32_t thread, group[3];  // who was running at a fault
};

}  // namespace emulator

#define MSL_EXPORT extern "C" __attribute__((visibility("default")))
