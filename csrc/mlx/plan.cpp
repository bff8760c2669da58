#include "plan.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "spec.h"

namespace moefast::binding {
namespace {

std::string describe(const mx::array& array) {
  std::ostringstream text;
  text << array.dtype() << " " << array.shape();
  return text.str();
}

// An array has these dimensions; -1 stands for any.
bool has_shape(const mx::array& array, std::initializer_list<int64_t> shape) {
  return static_cast<size_t>(array.ndim()) == shape.size() &&
         std::equal(shape.begin(), shape.end(), array.shape().begin(),
                    [](int64_t want, int64_t got) { return want == got; });
}

class Checker {
 public:
  Checker(const Plan& plan, const std::vector<mx::array>& inputs) : plan_(plan), inputs_(inputs) {}

  void weight(const char* name, const std::optional<Weight>& weight) {
    if (weight) {
      this->weight(name, *weight);
    }
  }

  void weight(const char* name, const Weight& w) {
    const auto& form = w.form;
    const bool plain = form.mode == MOEFAST_PLAIN;
    const auto floats = plain || form.mode == MOEFAST_AFFINE ? mlx_dtype(form.dtype) : mx::uint8;
    matrix(name, ".weight", w.weight, form, plain ? form.in_dims : form.in_dims * form.bits / 32,
           plain ? floats : mx::uint32);
    if (!plain) {
      matrix(name, ".scales", w.scales, form, form.in_dims / form.group_size, floats);
    }
    if (w.biases >= 0) {
      matrix(name, ".biases", w.biases, form, form.in_dims / form.group_size, floats);
    }
    if (w.bias >= 0) {
      const auto& array = inputs_[w.bias];
      const bool fits = form.num_experts > 0 ? has_shape(array, {form.num_experts, form.out_dims})
                                             : has_shape(array, {form.out_dims});
      require(fits && float_dtype(array.dtype()) == form.bias_dtype, name, ".bias", array);
    }
    if (w.global_scale >= 0) {
      const auto& array = inputs_[w.global_scale];
      const bool fits =
          form.num_experts > 0 ? has_shape(array, {form.num_experts}) : has_shape(array, {});
      require(fits && array.dtype() == mx::float32, name, ".global_scale", array);
    }
  }

  void network(const std::optional<Network>& network) {
    if (network) {
      weight("gate", network->gate);
      weight("up", network->up);
      weight("down", network->down);
    }
  }

  // Floats [..., last] over x's (or the first input's) leading dimensions.
  void rows(const char* name, int index, int64_t last) {
    if (index < 0) {
      return;
    }
    const auto &array = inputs_[index], &first = inputs_[0];
    const bool fits =
        array.ndim() > 0 && array.ndim() == first.ndim() && (last < 0 || array.shape(-1) == last) &&
        std::equal(array.shape().begin(), array.shape().end() - 1, first.shape().begin());
    require(fits, name, "", array);
  }

  void dtype(const char* name, int index) {
    if (index >= 0) {
      const auto& array = inputs_[index];
      require(float_dtype(array.dtype()) == plan_.own_dtypes[index], name, "", array);
    }
  }

  void vector(const char* name, int index, int64_t size) {
    if (index >= 0) {
      require(has_shape(inputs_[index], {size}), name, "", inputs_[index]);
      dtype(name, index);
    }
  }

 private:
  void matrix(const char* name,
              const char* part,
              int index,
              const moefast_projection& form,
              int64_t columns,
              mx::Dtype dtype) {
    const auto& array = inputs_[index];
    const bool fits = form.num_experts > 0
                          ? has_shape(array, {form.num_experts, form.out_dims, columns})
                          : has_shape(array, {form.out_dims, columns});
    require(fits && array.dtype() == dtype, name, part, array);
  }

  void require(bool fits, const char* name, const char* part, const mx::array& array) {
    if (!fits) {
      refuse(plan_.name,
             std::string(name) + part + " must have the shape and dtype this call was made for",
             describe(array));
    }
  }

  const Plan& plan_;
  const std::vector<mx::array>& inputs_;
};

int64_t features(const Plan& plan) {
  switch (plan.op) {
    case Op::kMatmul:
      return plan.weights[0].form.in_dims;
    case Op::kRoute:
      return plan.router.num_experts;
    default:
      return plan.experts->up.form.in_dims;
  }
}

}  // namespace

void Plan::check(const std::vector<mx::array>& inputs) const {
  if (static_cast<int>(inputs.size()) != num_inputs) {
    refuse(name, "there must be " + std::to_string(num_inputs) + " inputs",
           std::to_string(inputs.size()));
  }
  Checker checker(*this, inputs);
  checker.rows(op == Op::kRoute ? "logits" : "x", 0, features(*this));
  checker.dtype(op == Op::kRoute ? "logits" : "x", 0);
  checker.rows("indices", indices, -1);
  if (indices >= 0 && !mx::issubdtype(inputs[indices].dtype(), mx::integer)) {
    refuse(name, "indices must be integers", describe(inputs[indices]));
  }
  if (mix >= 0) {
    checker.rows("weights", mix, inputs[indices].shape(-1));
    checker.dtype("weights", mix);
  }
  if (op == Op::kMoe) {
    checker.rows("logits", logits, router.num_experts);
    checker.dtype("logits", logits);
  }
  checker.vector("selection_bias", selection_bias, router.num_experts);
  checker.vector("expert_scale", expert_scale, router.num_experts);
  for (const Weight& weight : weights) {
    checker.weight("weight", weight);
  }
  checker.network(experts);
  checker.network(shared);
  checker.weight("shared gate", shared_gate);
}

bool Plan::fits(const std::vector<mx::array>& inputs) const {
  try {
    check(inputs);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

std::vector<mx::Shape> Plan::output_shapes(const std::vector<mx::array>& inputs) const {
  check(inputs);
  mx::Shape shape = inputs[0].shape();
  switch (op) {
    case Op::kMatmul: {
      std::vector<mx::Shape> shapes;
      for (const Weight& weight : weights) {
        shapes.push_back(shape);
        shapes.back().back() = static_cast<int>(weight.form.out_dims);
      }
      return shapes;
    }
    case Op::kRoute:
      shape.back() = static_cast<int>(router.top_k);
      return {shape, shape};
    case Op::kSwitchGlu: {
      mx::Shape apart = inputs[indices].shape();
      apart.push_back(shape.back());
      return {apart};
    }
    default:
      return {shape};
  }
}

std::vector<mx::Dtype> Plan::output_dtypes() const {
  if (op == Op::kRoute) {
    return {mx::uint32, mlx_dtype(out_dtype)};
  }
  return std::vector<mx::Dtype>(std::max<size_t>(1, weights.size()), mlx_dtype(out_dtype));
}

mx::Dtype mlx_dtype(int32_t dtype) {
  switch (dtype) {
    case MOEFAST_FLOAT16:
      return mx::float16;
    case MOEFAST_BFLOAT16:
      return mx::bfloat16;
    default:
      return mx::float32;
  }
}

int32_t float_dtype(mx::Dtype dtype) {
  if (dtype == mx::float32) {
    return MOEFAST_FLOAT32;
  }
  if (dtype == mx::float16) {
    return MOEFAST_FLOAT16;
  }
  return dtype == mx::bfloat16 ? MOEFAST_BFLOAT16 : -1;
}

}  // namespace moefast::binding
