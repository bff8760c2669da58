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

// The arrays of a call out of the Python objects that hold them.
struct Gathered {
  std::vector<mx::array> arrays;
  std::vector<nb::handle> objects;  // borrowed: they live as long as layers hold them

  void reserve(size_t size);
  // False: it is no array.
  bool add(nb::handle object);
};

// Layers of mlx.nn are dictionaries of arrays and layers. This appends the arrays that `weight`
// needs, as they are now. False: the layer is not of `type` (another may compute something else),
// or has other arrays.
bool append_layer(nb::handle layer, nb::handle type, const Weight& weight, Gathered& inputs);

// Likewise a network, a layer of layers: `types` from the first one on are its own, and those of
// its gate_proj, up_proj and down_proj.
bool append_network(nb::handle layers,
                    const nb::tuple& types,
                    size_t first_type,
                    const Network& network,
                    Gathered& inputs);

// All that a block of experts is made of: the networks `experts` and `shared`, and the layer
// `shared_gate`, as far as the plan has them.
bool append_block(nb::handle experts,
                  nb::handle shared,
                  nb::handle shared_gate,
                  const nb::tuple& types,
                  const Plan& plan,
                  Gathered& inputs);

}  // namespace moefast::binding

#endif
