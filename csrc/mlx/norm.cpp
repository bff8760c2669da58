#include "norm.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Maybe = std::optional<mx::array>;

// Inputs: x, and weight and bias as far as they are there.
class Norm : public Mirror {
 public:
  Norm(mx::Stream stream, bool centered, bool weight, bool bias, float eps)
      : Mirror(stream),
        centered_(centered),
        weight_(weight ? 1 : -1),
        bias_(bias ? 1 + weight : -1),
        eps_(eps) {}

  const char* name() const override { return centered_ ? "MoefastLayerNorm" : "MoefastRMSNorm"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const Norm&>(other);
    return centered_ == same.centered_ && weight_ == same.weight_ && bias_ == same.bias_ &&
           eps_ == same.eps_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }

 protected:
  const char* operation() const override { return centered_ ? "layer_norm" : "rms_norm"; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [centered = centered_, weight = weight_, bias = bias_, eps = eps_](const Arrays& in) {
      const auto at = [&](int i) { return i < 0 ? Maybe() : Maybe(in[i]); };
      return Arrays{centered ? mx::fast::layer_norm(in[0], at(weight), at(bias), eps)
                             : mx::fast::rms_norm(in[0], at(weight), eps)};
    };
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto vector = [&](int i) {
      return i < 0 ? moefast_vector{}
                   : moefast_vector{contiguous(inputs[i], copies, temporaries),
                                    float_dtype(inputs[i].dtype())};
    };
    const auto x = rows_of(inputs[0], copies, temporaries);
    const auto weight = vector(weight_), bias = vector(bias_);
    auto promoted = inputs[0].dtype();
    for (const auto& input : inputs) {
      promoted = mx::promote_types(promoted, input.dtype());
    }
    const auto dtype = float_dtype(promoted);
    auto* const out = outputs[0].data<void>();
    return [=, eps = eps_, centered = centered_] {
      throw_if_failed(moefast_norm(engine(), &x, &weight, &bias, eps, centered, out, dtype));
    };
  }

 private:
  bool centered_;
  int weight_;  // which input
  int bias_;
  float eps_;
};

mx::array norm(const char* name,
               const mx::array& x,
               const Maybe& weight,
               const Maybe& bias,
               float eps,
               bool centered) {
  if (x.ndim() == 0 || x.shape(-1) == 0 || float_dtype(x.dtype()) < 0) {
    refuse(name, "x must be a float array [..., dims]", shape_text(x));
  }
  std::vector<mx::array> inputs = {x};
  auto dtype = x.dtype();
  for (const auto* vector : {&weight, &bias}) {
    if (!*vector) {
      continue;
    }
    const auto& values = **vector;
    if (values.ndim() != 1 || values.shape(0) != x.shape(-1) || float_dtype(values.dtype()) < 0) {
      refuse(name, "weight and bias must be float arrays of " + std::to_string(x.shape(-1)),
             shape_text(values));
    }
    inputs.push_back(values);
    dtype = mx::promote_types(dtype, values.dtype());
  }
  return mirrored<Norm>(x.shape(), dtype, std::move(inputs), centered, weight.has_value(),
                        bias.has_value(), eps);
}

}  // namespace

mx::array rms_norm(const mx::array& x, const Maybe& weight, float eps) {
  return norm("rms_norm", x, weight, std::nullopt, eps, false);
}

mx::array layer_norm(const mx::array& x, const Maybe& weight, const Maybe& bias, float eps) {
  return norm("layer_norm", x, weight, bias, eps, true);
}

}  // namespace moefast::binding
