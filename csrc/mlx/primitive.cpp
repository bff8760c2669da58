#include "primitive.h"

#include "call.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;

// Runs what it encloses on a stream, as the operation itself.
class OnStream {
 public:
  explicit OnStream(mx::Stream stream)
      : device_(mx::default_device()), stream_(mx::default_stream(stream.device)) {
    mx::set_default_device(stream.device);
    mx::set_default_stream(stream);
  }
  ~OnStream() {
    mx::set_default_stream(stream_);
    mx::set_default_device(device_);
  }
  OnStream(const OnStream&) = delete;
  OnStream& operator=(const OnStream&) = delete;

 private:
  mx::Device device_;
  mx::Stream stream_;
};

// The reference as a function of some of the inputs. Of a router, the weights of `choice`: the
// indices that it chose, which are constants to a derivative.
auto reference_of(const Plan& plan,
                  const Arrays& inputs,
                  const std::vector<int>& argnums,
                  const std::optional<mx::array>& choice) {
  return [&plan, &inputs, &argnums, &choice](const Arrays& some) {
    Arrays all = inputs;
    for (size_t i = 0; i < argnums.size(); ++i) {
      all[argnums[i]] = some[i];
    }
    if (choice) {
      all.push_back(*choice);
    }
    return plan.reference(all);
  };
}

// Those of `argnums` that are floats: the others are constants to a derivative.
std::vector<int> differentiable(const Arrays& inputs, const std::vector<int>& argnums) {
  std::vector<int> found;
  for (const int i : argnums) {
    if (mx::issubdtype(inputs[i].dtype(), mx::floating)) {
      found.push_back(i);
    }
  }
  return found;
}

Arrays pick(const Arrays& inputs, const std::vector<int>& argnums) {
  Arrays some;
  for (const int i : argnums) {
    some.push_back(inputs[i]);
  }
  return some;
}

}  // namespace

std::function<void()> Operation::prepare(const Arrays& inputs,
                                         Arrays& outputs,
                                         Arrays& temporaries,
                                         long) {
  plan_->check(inputs);
  for (auto& output : outputs) {
    give_memory(output);
  }
  if (inputs[0].size() == 0) {
    return nullptr;
  }
  return [call = make_call(plan_, inputs, outputs, temporaries)] { run(call); };
}

void Operation::eval_gpu(const Arrays&, Arrays&) {
  refuse(plan_->name, "backend 'native' must run on a CPU stream", "a GPU stream");
}

Arrays Operation::jvp(const Arrays& primals,
                      const Arrays& tangents,
                      const std::vector<int>& argnums) {
  const OnStream context(stream());
  const auto chosen = differentiable(primals, argnums);
  Arrays directions;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (std::find(chosen.begin(), chosen.end(), argnums[i]) != chosen.end()) {
      directions.push_back(tangents[i]);
    }
  }
  Arrays found;
  std::optional<mx::array> choice;
  if (plan_->op == Op::kRoute) {
    choice = apply(plan_, primals)[0];
    found.push_back(mx::zeros_like(*choice));
  }
  const auto slopes =
      mx::jvp(reference_of(*plan_, primals, chosen, choice), pick(primals, chosen), directions)
          .second;
  found.insert(found.end(), slopes.begin(), slopes.end());
  return found;
}

Arrays Operation::vjp(const Arrays& primals,
                      const Arrays& cotangents,
                      const std::vector<int>& argnums,
                      const Arrays& outputs) {
  const OnStream context(stream());
  const auto chosen = differentiable(primals, argnums);
  std::optional<mx::array> choice;
  if (plan_->op == Op::kRoute) {
    choice = outputs[0];
  }
  const auto all = choice ? Arrays{cotangents.back()} : cotangents;  // indices have none
  const auto slopes = chosen.empty() ? Arrays{}
                                     : mx::vjp(reference_of(*plan_, primals, chosen, choice),
                                               pick(primals, chosen), all)
                                           .second;
  Arrays found;
  for (size_t i = 0, next = 0; i < argnums.size(); ++i) {
    const bool has_slope = next < chosen.size() && chosen[next] == argnums[i];
    found.push_back(has_slope ? slopes[next++] : mx::zeros_like(primals[argnums[i]]));
  }
  return found;
}

std::pair<Arrays, std::vector<int>> Operation::vmap(const Arrays& inputs,
                                                    const std::vector<int>& axes) {
  const OnStream context(stream());
  const size_t outputs = plan_->output_dtypes().size();
  const std::vector<int> first(outputs, 0);
  // x, indices, weights of routes, logits: what has leading dimensions gets one more.
  const auto per_token = [this](int i) {
    return i == plan_->x || i == plan_->indices || i == plan_->mix || i == plan_->logits;
  };
  int size = 0;
  bool tokens_only = true;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) {
      size = inputs[i].shape(axes[i]);
      tokens_only = tokens_only && per_token(static_cast<int>(i));
    }
  }
  if (!tokens_only && plan_->op == Op::kRoute) {
    refuse(plan_->name, "backend 'native' must be mapped over logits only", "vmap over a vector");
  }
  if (!tokens_only) {
    return {mx::vmap(plan_->reference, axes, first)(inputs), first};
  }
  Arrays batched = inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) {
      batched[i] = mx::moveaxis(inputs[i], axes[i], 0);
    } else if (per_token(static_cast<int>(i))) {
      mx::Shape shape = inputs[i].shape();
      shape.insert(shape.begin(), size);
      batched[i] = mx::broadcast_to(mx::expand_dims(inputs[i], 0), shape);
    }
  }
  return {apply(plan_, std::move(batched)), first};
}

Arrays apply(std::shared_ptr<const Plan> plan, Arrays inputs) {
  auto shapes = plan->output_shapes(inputs);
  auto dtypes = plan->output_dtypes();
  auto primitive =
      std::make_shared<Operation>(mx::default_stream(mx::default_device()), std::move(plan));
  if (shapes.size() == 1) {
    return {mx::array(std::move(shapes[0]), dtypes[0], std::move(primitive), std::move(inputs))};
  }
  return mx::array::make_arrays(std::move(shapes), dtypes, std::move(primitive), inputs);
}

}  // namespace moefast::binding
