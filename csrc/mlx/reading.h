// Plans out of moefast's Python objects: specs (moefast/specs.py) and layouts (moefast/weights.py).
#ifndef MOEFAST_MLX_READING_H
#define MOEFAST_MLX_READING_H

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace moefast::binding {

namespace nb = nanobind;

// What Python says of a plan. Objects are None where the operation has none such.
struct Request {
  std::string op;
  // Of the operation's own arrays, None where one is not there:
  //   quantized_matmul x | switch_glu x | experts x, weights | route logits, selection_bias,
  //   expert_scale moe x, logits, selection_bias, expert_scale
  std::vector<std::optional<std::string>> dtypes;
  nb::object spec;         // moefast.RouterSpec
  nb::object layout;       // Layout of a dense product, else ExpertLayout
  nb::object shared;       // ExpertLayout
  nb::object shared_gate;  // Layout
  std::optional<std::string> combine_dtype;
  std::string out_dtype;
  nb::callable reference;  // of a list of arrays; kept for as long as the process lives
};

std::shared_ptr<const Plan> plan_of(const Request& request);

}  // namespace moefast::binding

#endif
