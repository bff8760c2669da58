// The words of moefast's specs as the numbers of moefast.h, for both bindings.
//
// Specs are read attribute by attribute: a moefast.RouterSpec or Activation will do, and so will
// any object with their fields. `Spec` wraps the binding library's object; spec.get<T>(name) reads
// an attribute.
#ifndef MOEFAST_SPEC_H
#define MOEFAST_SPEC_H

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "moefast.h"

namespace moefast::binding {

struct Word {
  std::string_view name;
  int32_t value;
};

inline constexpr Word kDtypes[] = {
    {"float32", MOEFAST_FLOAT32}, {"float16", MOEFAST_FLOAT16}, {"bfloat16", MOEFAST_BFLOAT16}};

inline constexpr Word kModes[] = {{"affine", MOEFAST_AFFINE},
                                  {"mxfp4", MOEFAST_MXFP4},
                                  {"mxfp8", MOEFAST_MXFP8},
                                  {"nvfp4", MOEFAST_NVFP4}};

inline constexpr Word kActivations[] = {{"swiglu", MOEFAST_SWIGLU},
                                        {"swiglu_oai", MOEFAST_SWIGLU_OAI},
                                        {"swiglu_clipped", MOEFAST_SWIGLU_CLIPPED},
                                        {"swiglu_clamped", MOEFAST_SWIGLU_CLAMPED},
                                        {"geglu_tanh", MOEFAST_GEGLU_TANH},
                                        {"situ", MOEFAST_SITU},
                                        {"gelu_tanh", MOEFAST_GELU_TANH},
                                        {"relu2", MOEFAST_RELU2}};

inline constexpr Word kScores[] = {{"softmax", MOEFAST_SOFTMAX},
                                   {"sigmoid", MOEFAST_SIGMOID},
                                   {"sqrtsoftplus", MOEFAST_SQRTSOFTPLUS}};

// Throws std::invalid_argument: "[operation] rule, got value."
[[noreturn]] inline void refuse(const std::string& operation,
                                const std::string& rule,
                                const std::string& got) {
  throw std::invalid_argument("[" + operation + "] " + rule + ", got " + got + ".");
}

template <size_t N>
int32_t value_of(const char* what, const Word (&words)[N], std::string_view name) {
  std::string known;
  for (const Word& word : words) {
    if (word.name == name) {
      return word.value;
    }
    known += (known.empty() ? "" : ", ") + std::string(word.name);
  }
  refuse(what, "the name must be one of " + known, "'" + std::string(name) + "'");
}

inline int32_t dtype_of(std::string_view name) {
  return value_of("dtype", kDtypes, name);
}

// An optional dtype: -1 where there is none, -2 where it is the word `other`.
inline int32_t dtype_or(const std::optional<std::string>& name, std::string_view other = "") {
  if (!name) {
    return -1;
  }
  return !other.empty() && *name == other ? -2 : dtype_of(*name);
}

template <class Spec>
moefast_activation activation_of(const Spec& spec) {
  const auto linear = spec.template get<std::optional<float>>("linear_beta");
  return {.kind = value_of("Activation", kActivations, spec.template get<std::string>("name")),
          .alpha = spec.template get<float>("alpha"),
          .limit = spec.template get<float>("limit"),
          .beta = spec.template get<float>("beta"),
          .linear_beta = linear ? *linear : std::nanf("")};
}

template <class Spec>
moefast_router router_of(const Spec& spec) {
  using Text = std::string;
  using MaybeText = std::optional<std::string>;
  const auto is = [&](const char* name, const char* value) -> int32_t {
    return spec.template get<Text>(name) == value;
  };
  const auto flag = [&](const char* name) -> int32_t { return spec.template get<bool>(name); };
  return {.num_experts = spec.template get<int64_t>("num_experts"),
          .top_k = spec.template get<int64_t>("top_k"),
          .softcap = spec.template get<float>("softcap"),
          .temperature = spec.template get<float>("temperature"),
          .score = value_of("RouterSpec", kScores, spec.template get<Text>("score")),
          .score_selected = is("score_over", "selected"),
          .score_dtype = dtype_or(spec.template get<MaybeText>("score_dtype")),
          .precise = flag("precise"),
          .bias_dtype = dtype_or(spec.template get<MaybeText>("bias_dtype"), "scores"),
          .num_groups = spec.template get<int64_t>("num_groups"),
          .top_groups = spec.template get<int64_t>("top_groups"),
          .group_max = is("group_score", "max"),
          .dropped_minus_inf = is("dropped_fill", "-inf"),
          .ties_highest = is("ties", "highest"),
          .weights_masked = is("weights_from", "masked"),
          .renormalize = flag("renormalize"),
          .renormalize_eps = spec.template get<float>("renormalize_eps"),
          .eps_max = is("eps_form", "max"),
          .scale = spec.template get<float>("scale"),
          .scale_output = is("scale_place", "output"),
          .weight_dtype = dtype_or(spec.template get<MaybeText>("weight_dtype"), "logits"),
          .identity_experts = spec.template get<int64_t>("identity_experts")};
}

}  // namespace moefast::binding

#endif
