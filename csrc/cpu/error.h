// Failing: a status for the caller and a sentence for moefast_error().
#ifndef MOEFAST_CPU_ERROR_H
#define MOEFAST_CPU_ERROR_H

#include "moefast.h"

namespace moefast {

// Remembers "[operation] rule, got value." (printf's conversions) for moefast_error() on this
// thread, and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int fail(int status, const char* format, ...);

}  // namespace moefast

#endif
