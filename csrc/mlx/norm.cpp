#include "norm.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Maybe = std::optional<mx::array>;

// What is normed: x, or x and a branch added to it.
struct Settings {
  bool centered;
  bool weight;
  bool bias;
  float eps;
  std::optional<float> multiplier;  // of the branch, where there is one

  bool operator==(const Settings&) const = default;

  const char* pick(const char* rms,
                   const char* layer,
                   const char* add_rms,
                   const char* add_layer) const {
    return multiplier ? (centered ? add_layer : add_rms) : (centered ? layer : rms);
  }
  const char* operation() const {
    return pick("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm");
  }
};

// Inputs: x, then branch, weight and bias as far as they are there. Outputs: the sum, if it is one,
// and the norm.
class Norm : public Mirror {
 public:
  Norm(mx::Stream stream, Settings settings)
      : Mirror(stream),
        settings_(settings),
        weight_(settings.weight ? 1 + adds() : -1),
        bias_(settings.bias ? 1 + adds() + settings.weight : -1) {}

  const char* name() const override {
    return settings_.pick("MoefastRMSNorm", "MoefastLayerNorm", "MoefastAddRMSNorm",
                          "MoefastAddLayerNorm");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return settings_ == static_cast<const Norm&>(other).settings_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return std::vector<mx::Shape>(num_outputs(), inputs[0].shape());
  }

 protected:
  const char* operation() const override { return settings_.operation(); }
  size_t num_outputs() const override { return adds() ? 2 : 1; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [settings = settings_, weight = weight_, bias = bias_](const Arrays& in) {
      const auto at = [&](int i) { return i < 0 ? Maybe() : Maybe(in[i]); };
      const auto norm = [&](const mx::array& x) {
        return settings.centered ? mx::fast::layer_norm(x, at(weight), at(bias), settings.eps)
                                 : mx::fast::rms_norm(x, at(weight), settings.eps);
      };
      if (!settings.multiplier) {
        return Arrays{norm(in[0])};
      }
      const float multiplier = *settings.multiplier;
      const auto sum = mx::add(in[0], multiplier == 1.0f ? in[1] : multiplier * in[1]);
      return Arrays{sum, norm(sum)};
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
    auto* const out = outputs.back().data<void>();
    const auto dtype = float_dtype(outputs.back().dtype());
    if (!adds()) {
      return [=, s = settings_] {
        throw_if_failed(moefast_norm(engine(), &x, &weight, &bias, s.eps, s.centered, out, dtype));
      };
    }
    const auto branch = rows_of(inputs[1], copies, temporaries);
    auto* const sum = outputs[0].data<void>();
    const auto sum_dtype = float_dtype(outputs[0].dtype());
    const auto size = static_cast<int64_t>(outputs[1].size());
    return [=, s = settings_] {
      try {
        throw_if_failed(moefast_add_norm(engine(), &x, &branch, *s.multiplier, &weight, &bias,
                                         s.eps, s.centered, sum, sum_dtype, out, dtype));
      } catch (...) {
        fill_nan(dtype, out, size);  // the first output is Mirror's to fill
        throw;
      }
    };
  }

 private:
  bool adds() const { return settings_.multiplier.has_value(); }

  Settings settings_;
  int weight_;  // which input
  int bias_;
};

Settings settings_of(const Maybe& weight,
                     const Maybe& bias,
                     float eps,
                     bool centered,
                     std::optional<float> multiplier = std::nullopt) {
  return {centered, weight.has_value(), bias.has_value(), eps, multiplier};
}

// Puts weight and bias behind the other inputs; returns the dtype of the norm of rows of `dtype`.
mx::Dtype append(const char* name,
                 std::vector<mx::array>& inputs,
                 mx::Dtype dtype,
                 const Maybe& weight,
                 const Maybe& bias) {
  const int dims = inputs[0].shape(-1);
  for (const auto* vector : {&weight, &bias}) {
    if (!*vector) {
      continue;
    }
    const auto& values = **vector;
    if (values.ndim() != 1 || values.shape(0) != dims || float_dtype(values.dtype()) < 0) {
      refuse(name, "weight and bias must be float arrays of " + std::to_string(dims),
             shape_text(values));
    }
    inputs.push_back(values);
    dtype = mx::promote_types(dtype, values.dtype());
  }
  return dtype;
}

void check_rows(const char* name, const mx::array& x) {
  if (x.ndim() == 0 || x.shape(-1) == 0 || float_dtype(x.dtype()) < 0) {
    refuse(name, "x must be a float array [..., dims]", shape_text(x));
  }
}

mx::array norm(const mx::array& x, const Maybe& weight, const Maybe& bias, Settings settings) {
  const char* name = settings.operation();
  check_rows(name, x);
  std::vector<mx::array> inputs = {x};
  const auto dtype = append(name, inputs, x.dtype(), weight, bias);
  return mirrored<Norm>(x.shape(), dtype, std::move(inputs), settings);
}

SumAndNorm add_norm(const mx::array& x,
                    const mx::array& branch,
                    const Maybe& weight,
                    const Maybe& bias,
                    Settings settings) {
  const char* name = settings.operation();
  check_rows(name, x);
  if (branch.shape() != x.shape() || float_dtype(branch.dtype()) < 0) {
    refuse(name, "branch must be a float array " + shape_text(x), shape_text(branch));
  }
  std::vector<mx::array> inputs = {x, branch};
  const auto sum_dtype = mx::promote_types(x.dtype(), branch.dtype());
  const auto dtype = append(name, inputs, sum_dtype, weight, bias);
  auto primitive =
      std::make_shared<Norm>(mx::default_stream(mx::default_device()), std::move(settings));
  auto made = mx::array::make_arrays({x.shape(), x.shape()}, {sum_dtype, dtype}, primitive, inputs);
  return {made[0], made[1]};
}

}  // namespace

mx::array rms_norm(const mx::array& x, const Maybe& weight, float eps) {
  return norm(x, weight, std::nullopt, settings_of(weight, std::nullopt, eps, false));
}

mx::array layer_norm(const mx::array& x, const Maybe& weight, const Maybe& bias, float eps) {
  return norm(x, weight, bias, settings_of(weight, bias, eps, true));
}

SumAndNorm add_rms_norm(
    const mx::array& x, const mx::array& branch, const Maybe& weight, float eps, float multiplier) {
  return add_norm(x, branch, weight, std::nullopt,
                  settings_of(weight, std::nullopt, eps, false, multiplier));
}

SumAndNorm add_layer_norm(const mx::array& x,
                          const mx::array& branch,
                          const Maybe& weight,
                          const Maybe& bias,
                          float eps,
                          float multiplier) {
  return add_norm(x, branch, weight, bias, settings_of(weight, bias, eps, true, multiplier));
}

}  // namespace moefast::binding
