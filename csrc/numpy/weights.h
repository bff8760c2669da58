// Weights as the NumPy module holds them: the arrays, kept alive, and their description.
#ifndef MOEFAST_NUMPY_WEIGHTS_H
#define MOEFAST_NUMPY_WEIGHTS_H

#include "arrays.h"

namespace moefast::binding {

// One linear map, or a stack of them. The constructor checks every array against the others.
class Projection {
 public:
  // `quant` has mode, bits and group_size (a moefast.QuantSpec), or is None for plain floats.
  Projection(py::array weight,
             MaybeArray scales,
             MaybeArray biases,
             MaybeArray bias,
             MaybeArray global_scale,
             const py::object& quant);

  const moefast_projection& description() const { return description_; }

 private:
  void describe_packed(const py::array& weight, const MaybeArray& scales, const MaybeArray& biases);

  moefast_projection description_{};
  std::vector<py::array> arrays_;
};

// down(activation(gate(x), up(x))).
class Ffn {
 public:
  // `activation` has name, alpha, limit, beta and linear_beta: a moefast.Activation.
  Ffn(std::shared_ptr<Projection> up,
      std::shared_ptr<Projection> down,
      std::shared_ptr<Projection> gate,
      const py::object& activation);

  const moefast_ffn& description() const { return description_; }
  int64_t hidden() const { return up_->description().in_dims; }
  int64_t num_experts() const { return up_->description().num_experts; }

 private:
  std::shared_ptr<Projection> up_, down_, gate_;
  moefast_ffn description_{};
};

// Reads the attributes of a Python object, for spec.h.
struct Attributes {
  const py::object& object;

  template <class T>
  T get(const char* name) const {
    return object.attr(name).template cast<T>();
  }
};

}  // namespace moefast::binding

#endif
