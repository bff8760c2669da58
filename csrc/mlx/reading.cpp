#include "reading.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "spec.h"

namespace moefast::binding {
namespace {

// Reads the attributes of a Python object, for spec.h.
struct Attributes {
  nb::handle object;

  template <class T>
  T get(const char* name) const {
    return nb::cast<T>(object.attr(name));
  }
};

// The arrays of `layout`, a Layout, are the next of the inputs.
Weight weight_of(nb::handle layout, int& next) {
  const Attributes of{layout};
  Weight weight{};
  auto& form = weight.form;
  form.num_experts = of.get<int64_t>("num_experts");
  form.out_dims = of.get<int64_t>("out_dims");
  form.in_dims = of.get<int64_t>("in_dims");
  // The scales of the float modes are bytes, and the number is not used then.
  form.dtype = std::max(float_dtype(of.get<mx::Dtype>("dtype")), 0);
  weight.weight = next++;
  const nb::object quant = layout.attr("quant");
  if (!quant.is_none()) {
    const Attributes spec{quant};
    form.mode = value_of("QuantSpec", kModes, spec.get<std::string>("mode"));
    form.bits = spec.get<int32_t>("bits");
    form.group_size = spec.get<int32_t>("group_size");
    weight.scales = next++;
    if (form.mode == MOEFAST_AFFINE) {
      weight.biases = next++;
    }
  }
  if (const auto bias = of.get<std::optional<std::string>>("bias")) {
    form.bias_dtype = dtype_of(*bias);
    weight.bias = next++;
  }
  if (of.get<bool>("global_scale")) {
    weight.global_scale = next++;
  }
  return weight;
}

std::optional<Weight> maybe_weight(nb::handle layout, int& next) {
  return layout.is_none() ? std::nullopt : std::optional(weight_of(layout, next));
}

// `layout` is an ExpertLayout.
std::optional<Network> maybe_network(nb::handle layout, int& next) {
  if (layout.is_none()) {
    return std::nullopt;
  }
  Network network{};
  network.gate = maybe_weight(layout.attr("gate"), next);
  network.up = weight_of(layout.attr("up"), next);
  network.down = weight_of(layout.attr("down"), next);
  network.activation = activation_of(Attributes{layout.attr("activation")});
  return network;
}

// Primitives, and plans with them, are destroyed on threads that do not hold the GIL: what a plan
// has of Python lives for ever.
auto immortal(nb::callable function) {
  auto* const object = new nb::object(std::move(function));
  return [object](const std::vector<mx::array>& inputs) {
    const nb::gil_scoped_acquire gil;
    return nb::cast<std::vector<mx::array>>((*object)(nb::cast(inputs)));
  };
}

class Reader {
 public:
  explicit Reader(const Request& request) : request_(request) {}

  std::shared_ptr<const Plan> read() {
    auto& plan = *plan_;
    plan.name = request_.op;
    plan.primitive = "moefast_" + request_.op;
    plan.out_dtype = dtype_of(request_.out_dtype);
    plan.combine_dtype = dtype_or(request_.combine_dtype);
    plan.reference = immortal(request_.reference);
    if (request_.op == "quantized_matmul") {
      plan.op = Op::kMatmul;
      own(plan.x);
      plan.weights.push_back(weight_of(request_.layout, plan.num_inputs));
    } else if (request_.op == "quantized_matmuls") {
      plan.op = Op::kMatmul;
      own(plan.x);
      for (const nb::handle layout : request_.layout) {
        plan.weights.push_back(weight_of(layout, plan.num_inputs));
      }
      if (plan.weights.empty() || plan.weights.size() > kMostProducts) {
        refuse("plan", "there must be 1.." + std::to_string(kMostProducts) + " weights",
               std::to_string(plan.weights.size()));
      }
    } else if (request_.op == "switch_glu" || request_.op == "experts") {
      plan.op = request_.op == "experts" ? Op::kExperts : Op::kSwitchGlu;
      own(plan.x);
      plan.indices = next();
      plan.own_dtypes.push_back(-1);
      if (plan.op == Op::kExperts) {
        own(plan.mix);
      }
      plan.experts = maybe_network(request_.layout, plan.num_inputs);
    } else if (request_.op == "route") {
      plan.op = Op::kRoute;
      plan.router = router_of(Attributes{request_.spec});
      own(plan.logits);
      own(plan.selection_bias);
      own(plan.expert_scale);
    } else if (request_.op == "moe") {
      plan.op = Op::kMoe;
      plan.router = router_of(Attributes{request_.spec});
      own(plan.x);
      own(plan.logits);
      own(plan.selection_bias);
      own(plan.expert_scale);
      plan.experts = maybe_network(request_.layout, plan.num_inputs);
      plan.shared = maybe_network(request_.shared, plan.num_inputs);
      plan.shared_gate = maybe_weight(request_.shared_gate, plan.num_inputs);
    } else {
      refuse("plan", "op must be an operation", request_.op);
    }
    return plan_;
  }

 private:
  int next() { return plan_->num_inputs++; }

  // The next of the operation's own arrays, if it is there.
  void own(int& index) {
    const auto& dtype = request_.dtypes.at(asked_++);
    if (dtype) {
      index = next();
      plan_->own_dtypes.push_back(dtype_of(*dtype));
    }
  }

  const Request& request_;
  std::shared_ptr<Plan> plan_ = std::make_shared<Plan>();
  size_t asked_ = 0;
};

}  // namespace

std::shared_ptr<const Plan> plan_of(const Request& request) {
  return Reader(request).read();
}

}  // namespace moefast::binding
