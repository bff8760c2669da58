#include "weights.h"

namespace moefast::binding {

namespace {

constexpr const char* kProjection = "Projection";

bool known(int32_t mode, int32_t bits, int32_t group) {
  switch (mode) {
    case MOEFAST_AFFINE:
      return bits >= 2 && bits <= 8 && bits != 7 && (group == 32 || group == 64 || group == 128);
    case MOEFAST_MXFP4:
      return bits == 4 && group == 32;
    case MOEFAST_MXFP8:
      return bits == 8 && group == 32;
    default:
      return bits == 4 && group == 16;
  }
}

}  // namespace

Projection::Projection(py::array weight,
                       MaybeArray scales,
                       MaybeArray biases,
                       MaybeArray bias,
                       MaybeArray global_scale,
                       const py::object& quant) {
  if (weight.ndim() != 2 && weight.ndim() != 3) {
    refuse(kProjection, "weight must be [out, in] or [num_experts, out, in]", describe(weight));
  }
  if (weight.size() == 0) {
    refuse(kProjection, "weight must not be empty", describe(weight));
  }
  check_contiguous(kProjection, "weight", weight);
  auto& d = description_;
  std::vector<py::ssize_t> stack;
  if (weight.ndim() == 3) {
    stack.push_back(weight.shape(0));
    d.num_experts = weight.shape(0);
  }
  d.out_dims = weight.shape(weight.ndim() - 2);
  d.weight = weight.data();
  if (quant.is_none()) {
    d.mode = MOEFAST_PLAIN;
    d.dtype = float_dtype(kProjection, "weight", weight);
    d.in_dims = weight.shape(weight.ndim() - 1);
    if (scales || biases || global_scale) {
      refuse(kProjection, "an unquantized weight must have no scales", "some");
    }
  } else {
    const Attributes spec{quant};
    d.mode = value_of("QuantSpec", kModes, spec.get<std::string>("mode"));
    d.bits = spec.get<int32_t>("bits");
    d.group_size = spec.get<int32_t>("group_size");
    describe_packed(weight, scales, biases);
  }
  if (global_scale) {
    if (d.mode != MOEFAST_NVFP4) {
      refuse(kProjection, "global_scale must belong to mode nvfp4", "another mode");
    }
    const auto vector = vector_of(kProjection, "global_scale", global_scale, stack);
    if (vector.dtype != MOEFAST_FLOAT32) {
      refuse(kProjection, "global_scale must be float32", describe(*global_scale));
    }
    d.global_scale = static_cast<const float*>(vector.data);
  }
  if (bias) {
    auto shape = stack;
    shape.push_back(d.out_dims);
    const auto vector = vector_of(kProjection, "bias", bias, shape);
    d.bias = vector.data;
    d.bias_dtype = vector.dtype;
  }
  arrays_.push_back(std::move(weight));
  for (auto* array : {&scales, &biases, &bias, &global_scale}) {
    if (*array) {
      arrays_.push_back(std::move(**array));
    }
  }
}

void Projection::describe_packed(const py::array& weight,
                                 const MaybeArray& scales,
                                 const MaybeArray& biases) {
  auto& d = description_;
  if (!known(d.mode, d.bits, d.group_size)) {
    refuse(kProjection, "bits and group_size must be ones that the mode has",
           std::to_string(d.bits) + " and " + std::to_string(d.group_size));
  }
  const auto type = weight.dtype();
  if (type.kind() != 'u' || type.itemsize() != 4) {
    refuse(kProjection, "a quantized weight must be packed uint32", describe(weight));
  }
  if (!scales || scales->ndim() != weight.ndim()) {
    refuse(kProjection, "scales must have as many dimensions as weight",
           scales ? describe(*scales) : "None");
  }
  const py::ssize_t last = weight.ndim() - 1;
  d.in_dims = scales->shape(last) * d.group_size;
  std::vector<py::ssize_t> shape(weight.shape(), weight.shape() + last);
  shape.push_back(scales->shape(last));
  check_shape(kProjection, "scales", *scales, shape);
  check_contiguous(kProjection, "scales", *scales);
  if (weight.shape(last) * 32 != d.in_dims * d.bits) {
    refuse(kProjection,
           "weight.shape[-1] must be " + std::to_string(d.in_dims * d.bits / 32) + " for scales " +
               describe(*scales),
           describe(weight));
  }
  d.scales = scales->data();
  if ((d.mode == MOEFAST_AFFINE) != biases.has_value()) {
    refuse(kProjection, "biases must be given exactly for mode affine",
           biases ? describe(*biases) : "None");
  }
  if (d.mode != MOEFAST_AFFINE) {
    if (scales->dtype().kind() != 'u' || scales->itemsize() != 1) {
      refuse(kProjection, "scales must be uint8", describe(*scales));
    }
    return;
  }
  const auto vector = vector_of(kProjection, "biases", biases, shape);
  d.biases = vector.data;
  d.dtype = float_dtype(kProjection, "scales", *scales);
  if (d.dtype != vector.dtype) {
    refuse(kProjection, "biases must be like scales " + describe(*scales), describe(*biases));
  }
}

Ffn::Ffn(std::shared_ptr<Projection> up,
         std::shared_ptr<Projection> down,
         std::shared_ptr<Projection> gate,
         const py::object& activation)
    : up_(std::move(up)), down_(std::move(down)), gate_(std::move(gate)) {
  description_ = {.gate = gate_ ? &gate_->description() : nullptr,
                  .up = &up_->description(),
                  .down = &down_->description(),
                  .activation = activation_of(Attributes{activation})};
  const auto sizes = [](const moefast_projection& p) {
    return "[" + std::to_string(p.num_experts) + ", " + std::to_string(p.out_dims) + ", " +
           std::to_string(p.in_dims) + "]";
  };
  const auto &u = up_->description(), &d = down_->description();
  if ((gate_ != nullptr) != (description_.activation.kind < MOEFAST_GELU_TANH)) {
    refuse("Ffn", "gate must be given exactly where the activation is gated",
           gate_ ? "one" : "none");
  }
  if (gate_ && sizes(gate_->description()) != sizes(u)) {
    refuse("Ffn", "gate must have up's sizes " + sizes(u), sizes(gate_->description()));
  }
  if (d.num_experts != u.num_experts || d.in_dims != u.out_dims || d.out_dims != u.in_dims) {
    refuse("Ffn", "down must undo up's sizes " + sizes(u), sizes(d));
  }
}

}  // namespace moefast::binding
