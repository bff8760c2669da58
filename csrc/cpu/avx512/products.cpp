// The hand-written products of AVX-512, by format. In a file of its own: there are many of them,
// and what the compiler needs to be told for the generic code would only slow it down here.
#include "products.h"

#include "codes.h"
#include "plain.h"

namespace moefast {
namespace {

constexpr int kLayoutNibbles = 101;
constexpr int kLayoutBytes = 102;
constexpr int kLayoutInOrder = 103;
constexpr int kLayoutEvenOdd = 104;

template <class Codes, ScaleKind kKind, int kGroup>
const Product* coded() {
  using P = CodedProduct<Codes, kKind, kGroup>;
  static constexpr Product kProduct = {
      Codes::kOrder == kNibbles ? "int15 x 4 bits" : "int15 x bytes",
      Codes::kOrder == kNibbles ? kLayoutNibbles : kLayoutBytes,
      true,
      P::prepared_bytes,
      P::prepare,
      P::multiply};
  return &kProduct;
}

template <class Codes, ScaleKind kKind>
const Product* of_group(int group) {
  switch (group) {
    case 32:
      return coded<Codes, kKind, 32>();
    case 64:
      return coded<Codes, kKind, 64>();
    case 128:
      return coded<Codes, kKind, 128>();
    default:
      return nullptr;
  }
}

template <class Codes>
const Product* affine(const Format& format) {
  switch (format.dtype) {
    case MOEFAST_FLOAT32:
      return of_group<Codes, kScaleFloat32>(format.group);
    case MOEFAST_FLOAT16:
      return of_group<Codes, kScaleFloat16>(format.group);
    default:
      return of_group<Codes, kScaleBfloat16>(format.group);
  }
}

const Product* int15(const Format& format) {
  switch (format.mode) {
    case MOEFAST_MXFP4:
      return coded<NibbleCodes<true>, kScaleE8m0, 32>();
    case MOEFAST_NVFP4:
      return coded<NibbleCodes<true>, kScaleE4m3, 16>();
    case MOEFAST_AFFINE:
      break;
    default:
      return nullptr;
  }
  switch (format.bits) {
    case 2:
      return affine<ByteCodes<2>>(format);
    case 3:
      return affine<ByteCodes<3>>(format);
    case 4:
      return affine<NibbleCodes<false>>(format);
    case 5:
      return affine<ByteCodes<5>>(format);
    case 6:
      return affine<ByteCodes<6>>(format);
    default:
      return affine<ByteCodes<8>>(format);
  }
}

template <int kType>
const Product* plain() {
  using P = PlainProduct<kType>;
  static constexpr Product kProduct = {"float32 x plain",
                                       kType == MOEFAST_BFLOAT16 ? kLayoutEvenOdd : kLayoutInOrder,
                                       true,
                                       P::prepared_bytes,
                                       P::prepare,
                                       P::multiply};
  return &kProduct;
}

}  // namespace

const Product* avx512_product(const Format& format, Precision precision) {
  if (format.mode == MOEFAST_PLAIN) {
    return format.dtype == MOEFAST_FLOAT32   ? plain<MOEFAST_FLOAT32>()
           : format.dtype == MOEFAST_FLOAT16 ? plain<MOEFAST_FLOAT16>()
                                             : plain<MOEFAST_BFLOAT16>();
  }
  if (precision > kFloat32) {
    if (const Product* found = int15(format)) {
      return found;
    }
  }
  return nullptr;
}

}  // namespace moefast
