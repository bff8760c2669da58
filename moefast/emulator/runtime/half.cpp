// Conversions that the compiler calls where the processor has no instruction for them.
#include <stdint.h>
#include <string.h>

#include "abi.h"

// Round to nearest, ties to even; a NaN stays one.
static uint16_t bfloat_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__x86_64__)
// The compiler returns __bf16 in a vector register.
MSL_EXPORT __bf16 __truncsfbf2(float value) {
  uint16_t bits = bfloat_bits(value);
  __bf16 result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
#endif

// For tests of the arithmetic, on any processor.
MSL_EXPORT uint16_t msl_bfloat_bits(float value) {
  return bfloat_bits(value);
}
