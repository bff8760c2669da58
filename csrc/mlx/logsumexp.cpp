#include "logsumexp.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

constexpr const char* kName = "logsumexp";

class LogSumExp : public Mirror {
 public:
  using Mirror::Mirror;

  const char* name() const override { return "MoefastLogSumExp"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {shape_of(inputs[0])};
  }

  static mx::Shape shape_of(const mx::array& x) {
    mx::Shape shape = x.shape();
    shape.back() = 1;
    return shape;
  }

 protected:
  const char* operation() const override { return kName; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [](const Arrays& in) { return Arrays{mx::logsumexp(in[0], -1, true)}; };
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto x = rows_of(inputs[0], copies, temporaries);
    auto* const out = outputs[0].data<void>();
    const auto dtype = float_dtype(outputs[0].dtype());
    return [=] { throw_if_failed(moefast_logsumexp(engine(), &x, out, dtype)); };
  }
};

}  // namespace

mx::array logsumexp(const mx::array& x) {
  if (x.ndim() == 0 || x.shape(-1) == 0 || float_dtype(x.dtype()) < 0) {
    refuse(kName, "x must be a float array [..., dims]", shape_text(x));
  }
  return mirrored<LogSumExp>(LogSumExp::shape_of(x), x.dtype(), {x});
}

}  // namespace moefast::binding
