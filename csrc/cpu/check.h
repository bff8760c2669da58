// The rules for what comes in through the C interface. Each throws BadValue naming rule and value.
#ifndef MOEFAST_CPU_CHECK_H
#define MOEFAST_CPU_CHECK_H

#include "types.h"

namespace moefast {

// "rule, got value." with printf's conversions; throws.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

void check_pointer(const char* name, const void* pointer);
void check_dtype(const char* name, int32_t dtype);
void check_rows(const char* name, const moefast_rows& rows);
void check_heads(const char* name, const moefast_heads& heads);
void check_projection(const char* name, const moefast_projection& projection);
// The projections of `ffn` fit one another, the activation is known, and `stacked` says whether
// they are.
void check_ffn(const char* name, const moefast_ffn& ffn, int64_t hidden, bool stacked);
// Every index is in 0..num_experts - 1.
void check_indices(const int32_t* indices, int64_t count, int64_t num_experts);

}  // namespace moefast

#endif
