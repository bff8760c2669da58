// The arrays of a call, as Python holds them: in an object made for it, or in the layers of a
// model.
#ifndef MOEFAST_MLX_LAYERS_H
#define MOEFAST_MLX_LAYERS_H

#include <nanobind/nanobind.h>

#include <vector>

#include "plan.h"

namespace moefast::binding {

namespace nb = nanobind;

// The arrays of weights, in the order of a plan. It holds the Python objects, and looks at what
// they stand for in every call: they may have been changed in place.
class Weights {
 public:
  explicit Weights(std::vector<nb::object> arrays);

  void append_to(std::vector<mx::array>& inputs) const;

 private:
  std::vector<nb::object> arrays_;
};

// Layers of mlx.nn are dictionaries of arrays and layers. This appends the arrays that `weight`
// needs, as they are now. False: the layer is not of `type` (another may compute something else),
// or has other arrays.
bool append_layer(nb::handle layer,
                  nb::handle type,
                  const Weight& weight,
                  std::vector<mx::array>& inputs);

// Likewise the layers gate_proj, up_proj and down_proj of a network; `types` are theirs.
bool append_layers(nb::handle layers,
                   const nb::tuple& types,
                   size_t first_type,
                   const Network& network,
                   std::vector<mx::array>& inputs);

}  // namespace moefast::binding

#endif
