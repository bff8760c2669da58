// The tile unit: eight tiles of 16 rows of 64 bytes.
//
// Written in assembly, because GCC's intrinsics before version 14 declare too few bytes of the
// configuration as read and do not declare the memory of tile loads as read at all, so that the
// stores before them may be dropped or moved.
#ifndef MOEFAST_CPU_AMX_TILES_H
#define MOEFAST_CPU_AMX_TILES_H

#include <stdint.h>

namespace moefast {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles in full size, for as long as this object lives. Between uses the state is given
// up, which spares the kernel from saving 8 KB when it switches threads.
class Tiles {
 public:
  Tiles() {
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#define MOEFAST_TILE_FUNCTIONS(t)                                                          \
  static inline void tile_zero##t() {                                                      \
    asm volatile("tilezero %%tmm" #t : : : "memory");                                      \
  }                                                                                        \
  static inline void tile_load##t(const void* from, int64_t stride) {                      \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"(stride) : "memory");   \
  }                                                                                        \
  static inline void tile_store##t(void* to, int64_t stride) {                             \
    asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"(stride) : "memory"); \
  }

MOEFAST_TILE_FUNCTIONS(0)
MOEFAST_TILE_FUNCTIONS(1)
MOEFAST_TILE_FUNCTIONS(2)
MOEFAST_TILE_FUNCTIONS(3)
MOEFAST_TILE_FUNCTIONS(4)
MOEFAST_TILE_FUNCTIONS(5)
MOEFAST_TILE_FUNCTIONS(6)
MOEFAST_TILE_FUNCTIONS(7)
#undef MOEFAST_TILE_FUNCTIONS

// Tile c += tile a (16 x 32 bfloat16) times tile b (16 pairs x 16 columns), in float32.
#define MOEFAST_TILE_PRODUCT(c, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")

}  // namespace
}  // namespace moefast

#endif
