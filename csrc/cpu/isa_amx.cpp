// AMX in bfloat16: Sapphire Rapids and later. Several rows of activations at once; the rest is
// AVX-512's.
#include "amx/product.h"
#include "isa.h"

namespace moefast {
namespace {

constexpr int kLayoutAsTheyCome = 201;
constexpr int kLayoutEveryFourth = 202;

// Fewer rows are done sooner as vectors.
constexpr int64_t kFewestRows = 5;

template <class Weights>
const Product* tiled() {
  using P = Tiled<Weights>;
  static constexpr Product kProduct = {
      "bfloat16 tiles",
      Weights::kOrder == kEveryFourth ? kLayoutEveryFourth : kLayoutAsTheyCome,
      false,
      P::prepared_bytes,
      P::prepare,
      P::multiply};
  return &kProduct;
}

const Product* product(const Format& format, Precision precision, int64_t, int64_t count) {
  if (precision != kBfloat16 || count < kFewestRows) {
    return nullptr;
  }
  switch (format.mode) {
    case MOEFAST_PLAIN:
      return format.dtype == MOEFAST_BFLOAT16 ? tiled<PlainWeights>() : nullptr;
    case MOEFAST_MXFP4:
      return tiled<TableWeights<4, true>>();
    case MOEFAST_MXFP8:
      return tiled<ReadWeights<E4m3Values>>();
    case MOEFAST_NVFP4:
      return tiled<ReadWeights<E2m1Values<16>>>();
    default:
      break;
  }
  switch (format.bits) {
    case 2:
      return tiled<ReadWeights<AffineValues<2>>>();
    case 3:
      return tiled<ReadWeights<AffineValues<3>>>();
    case 4:
      return format.group == 128  ? tiled<TableWeights<1, false>>()
             : format.group == 64 ? tiled<TableWeights<2, false>>()
                                  : tiled<TableWeights<4, false>>();
    case 5:
      return tiled<ReadWeights<AffineValues<5>>>();
    case 6:
      return tiled<ReadWeights<AffineValues<6>>>();
    default:
      return tiled<ReadWeights<AffineValues<8>>>();
  }
}

// Independent products of tiles that are never loaded, and the number of operations.
double count_tile_flops(int64_t rounds) {
  const Tiles tiles;
  ThreeColumns::zero();
  tile_zero6();
  tile_zero7();
  const int64_t products = rounds / 16;  // a round of them takes as long as several of vectors
  for (int64_t i = 0; i < products; ++i) {
    MOEFAST_TILE_PRODUCT(0, 6, 7);
    MOEFAST_TILE_PRODUCT(1, 6, 7);
    MOEFAST_TILE_PRODUCT(2, 6, 7);
    MOEFAST_TILE_PRODUCT(3, 6, 7);
    MOEFAST_TILE_PRODUCT(4, 6, 7);
    MOEFAST_TILE_PRODUCT(5, 6, 7);
  }
  constexpr double kOperations = 6.0 * 2 * 16 * 16 * 32;
  return kOperations * static_cast<double>(products);
}

}  // namespace

const Isa* isa_amx() {
  // Everything but products is AVX-512's.
  static const Isa isa = [] {
    Isa made = *isa_avx512();
    made.name = "amx";
    made.product = product;
    made.flops = count_tile_flops;
    made.base = isa_avx512();
    return made;
  }();
  return &isa;
}

}  // namespace moefast
