// Which instruction sets this build has and this machine runs.
//
// MOEFAST_HAVE_AVX2, _AVX512, _AMX and _NEON say which isa_*.cpp are in the build.
#include "isa.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace moefast {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a, b, c, d;
};

// Whether all of these bits of a register are set.
template <class... Bits>
bool has(unsigned word, Bits... bits) {
  return ((word >> bits & 1) & ...);
}

Registers cpuid(unsigned leaf, unsigned part = 0) {
  Registers r = {};
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) {
    return {};
  }
  return r;
}

// The register state that the operating system saves: without it instructions fault, or other
// threads see them.
uint64_t saved_state() {
  if (!has(cpuid(1).c, 27)) {  // OSXSAVE
    return 0;
  }
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool saves(uint64_t state) {
  return (saved_state() & state) == state;
}

constexpr uint64_t kYmm = 0x6;          // xmm, upper halves of ymm
constexpr uint64_t kZmm = kYmm | 0xe0;  // mask registers, upper halves of zmm, zmm16 to 31
constexpr uint64_t kTiles = 0x60000;    // tile configuration and data

[[maybe_unused]] bool has_avx2() {
  // FMA, F16C; AVX2
  return saves(kYmm) && has(cpuid(1).c, 12, 29) && has(cpuid(7).b, 5);
}

// What Ice Lake and Zen 4 brought together: a compiler told of such a machine may use any of it.
[[maybe_unused]] bool has_avx512() {
  const Registers extended = cpuid(7);
  return has_avx2() && saves(kZmm) && has(cpuid(1).c, 22) &&  // MOVBE
         has(cpuid(0x80000001).c, 5) &&                       // LZCNT
         has(extended.b, 3, 8) &&                             // BMI1, BMI2
         has(extended.b, 16, 17, 21, 28, 30, 31) &&           // AVX-512 F, DQ, IFMA, CD, BW, VL
         has(extended.c, 1, 6, 8, 11, 12, 14);  // VBMI, VBMI2, GFNI, VNNI, BITALG, VPOPCNTDQ
}

// Linux hands the tile registers only to processes that ask for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

[[maybe_unused]] bool has_amx() {
  const Registers extended = cpuid(7), further = cpuid(7, 1);
  return has_avx512() && saves(kTiles) && has(further.a, 4, 5) &&  // AVX-VNNI, AVX512_BF16
         has(extended.d, 22, 23, 24) &&  // AMX-BF16, AVX512_FP16, AMX-TILE
         may_use_tiles();
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

[[maybe_unused]] bool has_neon() {
  return has_feature("hw.optional.arm.FEAT_DotProd") && has_feature("hw.optional.arm.FEAT_I8MM") &&
         has_feature("hw.optional.arm.FEAT_FP16");
}

#elif defined(__aarch64__) && defined(__linux__)

[[maybe_unused]] bool has_neon() {
  constexpr unsigned long kHalfFloats = 1ul << 10;  // HWCAP_ASIMDHP
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kInt8Matrix = 1ul << 13;  // HWCAP2_I8MM
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return (first & kHalfFloats) != 0 && (first & kDotProduct) != 0 && (second & kInt8Matrix) != 0;
}

#else

[[maybe_unused]] bool has_neon() {
  return false;
}

#endif

// Best first.
struct Known {
  const Isa* isas[4];
  size_t count = 0;

  void add(bool runs, const Isa* (*isa)()) {
    if (runs && isa() != nullptr) {
      isas[count++] = isa();
    }
  }

  Known() {
#if defined(MOEFAST_HAVE_AMX)
    add(has_amx(), isa_amx);
#endif
#if defined(MOEFAST_HAVE_AVX512)
    add(has_avx512(), isa_avx512);
#endif
#if defined(MOEFAST_HAVE_AVX2)
    add(has_avx2(), isa_avx2);
#endif
#if defined(MOEFAST_HAVE_NEON)
    add(has_neon(), isa_neon);
#endif
    add(true, isa_portable);
  }
};

// Asked once per process.
const Known& known() {
  static const Known isas;
  return isas;
}

}  // namespace

const Isa* find_isa(const char* name) {
  for (size_t i = 0; i < known().count; ++i) {
    const Isa* isa = known().isas[i];
    if (name[0] == '\0' || std::strcmp(name, isa->name) == 0) {
      return isa;
    }
  }
  return nullptr;
}

size_t list_isas(const char** names, size_t capacity) {
  for (size_t i = 0; i < known().count && i < capacity; ++i) {
    names[i] = known().isas[i]->name;
  }
  return known().count;
}

const Product* find_product(
    const Isa& isa, const Format& format, Precision precision, int64_t in, int64_t count) {
  for (const Isa* at = &isa; at != nullptr; at = at->base) {
    if (const Product* product = at->product(format, precision, in, count)) {
      return product;
    }
  }
  return isa_portable()->product(format, precision, in, count);
}

}  // namespace moefast
