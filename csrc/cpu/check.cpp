#include "check.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "engine.h"

namespace moefast {

void refuse(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw BadValue(text);
}

void check_pointer(const char* name, const void* pointer) {
  if (pointer == nullptr) {
    refuse("%s must not be NULL, got NULL.", name);
  }
}

void check_dtype(const char* name, int32_t dtype) {
  if (dtype < MOEFAST_FLOAT32 || dtype > MOEFAST_BFLOAT16) {
    refuse("%s must be a dtype 0..2, got %" PRId32 ".", name, dtype);
  }
}

void check_rows(const char* name, const moefast_rows& rows) {
  check_dtype(name, rows.dtype);
  if (rows.count < 0 || rows.dims < 1) {
    refuse("%s must have count >= 0 and dims >= 1, got %" PRId64 " and %" PRId64 ".", name,
           rows.count, rows.dims);
  }
  if (rows.count > 0 && rows.data == nullptr) {
    refuse("%s must not be NULL, got NULL.", name);
  }
  if (reinterpret_cast<uintptr_t>(rows.data) % static_cast<uintptr_t>(size_of(rows.dtype)) != 0) {
    refuse("%s must be aligned to its dtype, got %p.", name, rows.data);
  }
}

void check_heads(const char* name, const moefast_heads& x) {
  check_dtype(name, x.dtype);
  if (x.batch < 0 || x.length < 0 || x.heads < 1 || x.dims < 1) {
    refuse("%s must have batch >= 0, length >= 0, heads >= 1 and dims >= 1, got %" PRId64
           ", %" PRId64 ", %" PRId64 " and %" PRId64 ".",
           name, x.batch, x.length, x.heads, x.dims);
  }
  if (x.batch > 0 && x.length > 0) {
    check_pointer(name, x.data);
  }
  if (reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(size_of(x.dtype)) != 0) {
    refuse("%s must be aligned to its dtype, got %p.", name, x.data);
  }
}

namespace {

bool known_format(const moefast_projection& p) {
  switch (p.mode) {
    case MOEFAST_PLAIN:
      return true;
    case MOEFAST_AFFINE:
      return (p.bits == 2 || p.bits == 3 || p.bits == 4 || p.bits == 5 || p.bits == 6 ||
              p.bits == 8) &&
             (p.group_size == 32 || p.group_size == 64 || p.group_size == 128);
    case MOEFAST_MXFP4:
      return p.bits == 4 && p.group_size == 32;
    case MOEFAST_MXFP8:
      return p.bits == 8 && p.group_size == 32;
    case MOEFAST_NVFP4:
      return p.bits == 4 && p.group_size == 16;
    default:
      return false;
  }
}

}  // namespace

void check_projection(const char* name, const moefast_projection& p) {
  if (!known_format(p)) {
    refuse("%s must have a known format, got mode %" PRId32 ", bits %" PRId32
           ", group_size %" PRId32 ".",
           name, p.mode, p.bits, p.group_size);
  }
  if (p.num_experts < 0 || p.out_dims < 1 || p.in_dims < 1) {
    refuse("%s must have sizes of at least 1, got %" PRId64 " x %" PRId64 " x %" PRId64 ".", name,
           p.num_experts, p.out_dims, p.in_dims);
  }
  if (p.weight == nullptr) {
    refuse("%s.weight must not be NULL, got NULL.", name);
  }
  if (p.mode == MOEFAST_PLAIN || p.mode == MOEFAST_AFFINE) {
    check_dtype(name, p.dtype);
  }
  if (p.mode != MOEFAST_PLAIN) {
    if (p.scales == nullptr || (p.biases != nullptr) != (p.mode == MOEFAST_AFFINE)) {
      refuse("%s must have scales, and biases where it is affine, got %p and %p.", name, p.scales,
             p.biases);
    }
    if (p.in_dims % p.group_size != 0) {
      refuse("%s.in_dims must be a multiple of its group of %" PRId32 ", got %" PRId64 ".", name,
             p.group_size, p.in_dims);
    }
  }
  if (p.global_scale != nullptr && p.mode != MOEFAST_NVFP4) {
    refuse("%s.global_scale belongs to nvfp4, got mode %" PRId32 ".", name, p.mode);
  }
  if (p.bias != nullptr) {
    check_dtype(name, p.bias_dtype);
  }
}

void check_ffn(const char* name, const moefast_ffn& ffn, int64_t hidden, bool stacked) {
  const int32_t kind = ffn.activation.kind;
  if (kind < MOEFAST_SWIGLU || kind > MOEFAST_RELU2) {
    refuse("%s.activation must be a kind 0..7, got %" PRId32 ".", name, kind);
  }
  const bool gated = kind < MOEFAST_GELU_TANH;
  if (ffn.up == nullptr || ffn.down == nullptr || (ffn.gate != nullptr) != gated) {
    refuse("%s must have up, down and, where the activation is gated, gate, got %p, %p and %p.",
           name, static_cast<const void*>(ffn.up), static_cast<const void*>(ffn.down),
           static_cast<const void*>(ffn.gate));
  }
  check_projection("up", *ffn.up);
  check_projection("down", *ffn.down);
  const moefast_projection& gate = gated ? *ffn.gate : *ffn.up;
  check_projection("gate", gate);
  const moefast_projection &up = *ffn.up, &down = *ffn.down;
  if (up.in_dims != hidden || gate.in_dims != hidden || down.out_dims != hidden) {
    refuse("%s must map hidden=%" PRId64 " to itself, got %" PRId64 ", %" PRId64 " and %" PRId64
           ".",
           name, hidden, gate.in_dims, up.in_dims, down.out_dims);
  }
  if (gate.out_dims != up.out_dims || down.in_dims != up.out_dims) {
    refuse("%s must have one width, got %" PRId64 ", %" PRId64 " and %" PRId64 ".", name,
           gate.out_dims, up.out_dims, down.in_dims);
  }
  if (gate.num_experts != up.num_experts || down.num_experts != up.num_experts ||
      (up.num_experts > 0) != stacked) {
    refuse("%s must have %s, got %" PRId64 ", %" PRId64 " and %" PRId64 ".", name,
           stacked ? "stacks of equally many experts" : "no stacks", gate.num_experts,
           up.num_experts, down.num_experts);
  }
}

void check_indices(const int32_t* indices, int64_t count, int64_t num_experts) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= num_experts) {
      refuse("indices must be in 0..%" PRId64 ", got %" PRId32 ".", num_experts - 1, indices[i]);
    }
  }
}

}  // namespace moefast
