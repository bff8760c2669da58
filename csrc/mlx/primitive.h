// The operations as MLX primitives: lazy, on any CPU stream, differentiable, traceable.
#ifndef MOEFAST_MLX_PRIMITIVE_H
#define MOEFAST_MLX_PRIMITIVE_H

#include <memory>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "plan.h"
#include "runnable.h"

namespace moefast::binding {

class Operation : public mx::Primitive, public Runnable {
 public:
  // `plan` lives as long as the process: equal plans are one object.
  Operation(mx::Stream stream, std::shared_ptr<const Plan> plan)
      : mx::Primitive(stream), plan_(std::move(plan)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    evaluate(*this, stream(), inputs, outputs);
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::function<void()> prepare(const std::vector<mx::array>& inputs,
                                std::vector<mx::array>& outputs,
                                std::vector<mx::array>& temporaries,
                                long references) override;

  // Derivatives are those of the reference, on the same inputs.
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;

  const char* name() const override { return plan_->primitive.c_str(); }
  bool is_equivalent(const mx::Primitive& other) const override {
    return plan_ == static_cast<const Operation&>(other).plan_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return plan_->output_shapes(inputs);
  }

 private:
  std::shared_ptr<const Plan> plan_;
};

// The outputs of a plan on `inputs`, on the default stream. Throws std::invalid_argument.
std::vector<mx::array> apply(std::shared_ptr<const Plan> plan, std::vector<mx::array> inputs);

}  // namespace moefast::binding

#endif
