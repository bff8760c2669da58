// Functions that are not exact: computed in double and rounded once, the same on every host.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

static const double kPi = 3.14159265358979323846;

// The argument of sinpi and its kin, reduced exactly.
static double within_period(double x) {
  return x - 2.0 * rint(x * 0.5);
}
static double sine_pi(double x) {
  x = within_period(x);
  return x == rint(x) ? copysign(0.0, x) : sin(kPi * x);
}
static double cosine_pi(double x) {
  x = fabs(within_period(x));
  return x == 0.5 ? 0.0 : cos(kPi * x);
}

#define FUNCTION(name, expression)              \
  MSL_EXPORT float msl_##name(float argument) { \
    double x = argument;                        \
    return (float)(expression);                 \
  }
FUNCTION(acos, acos(x))
FUNCTION(acosh, acosh(x))
FUNCTION(asin, asin(x))
FUNCTION(asinh, asinh(x))
FUNCTION(atan, atan(x))
FUNCTION(atanh, atanh(x))
FUNCTION(cos, cos(x))
FUNCTION(cosh, cosh(x))
FUNCTION(cospi, cosine_pi(x))
FUNCTION(exp, exp(x))
FUNCTION(exp10, pow(10.0, x))
FUNCTION(exp2, exp2(x))
FUNCTION(log, log(x))
FUNCTION(log10, log10(x))
FUNCTION(log2, log2(x))
FUNCTION(rsqrt, 1.0 / sqrt(x))
FUNCTION(sin, sin(x))
FUNCTION(sinh, sinh(x))
FUNCTION(sinpi, sine_pi(x))
FUNCTION(tan, tan(x))
FUNCTION(tanh, tanh(x))
FUNCTION(tanpi, sine_pi(x) / cosine_pi(x))

MSL_EXPORT float msl_atan2(float y, float x) {
  return (float)atan2((double)y, (double)x);
}
MSL_EXPORT float msl_pow(float x, float y) {
  return (float)pow((double)x, (double)y);
}
// As pow, but defined through logarithms: not for negative x.
MSL_EXPORT float msl_powr(float x, float y) {
  return x < 0 ? NAN : (float)pow((double)x, (double)y);
}
MSL_EXPORT float msl_fmod(float x, float y) {
  return fmodf(x, y);
}
MSL_EXPORT float msl_nextafter(float x, float y) {
  return nextafterf(x, y);
}
MSL_EXPORT float msl_ldexp(float x, int k) {
  return ldexpf(x, k);
}
MSL_EXPORT float msl_frexp(float x, int* k) {
  return frexpf(x, k);
}
