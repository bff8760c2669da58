#include "attention.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

class Attention : public Mirror {
 public:
  Attention(mx::Stream stream, float scale, bool causal)
      : Mirror(stream), scale_(scale), causal_(causal) {}

  const char* name() const override { return "MoefastAttention"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const Attention&>(other);
    return scale_ == same.scale_ && causal_ == same.causal_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {shape_of(inputs[0], inputs[2])};
  }

  static mx::Shape shape_of(const mx::array& queries, const mx::array& values) {
    return {queries.shape(0), queries.shape(2), queries.shape(1) * values.shape(3)};
  }

 protected:
  const char* operation() const override { return "attention"; }

  // In the layout of ours.
  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [scale = scale_, causal = causal_](const Arrays& inputs) {
      const auto y = mx::fast::scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], scale,
                                                            causal ? "causal" : "");
      const auto by_token = mx::transpose(y, {0, 2, 1, 3});
      return Arrays{mx::reshape(by_token, {y.shape(0), y.shape(2), y.shape(1) * y.shape(3)})};
    };
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto queries = heads_of(inputs[0], copies, temporaries);
    const auto keys = heads_of(inputs[1], copies, temporaries);
    const auto values = heads_of(inputs[2], copies, temporaries);
    auto* const out = outputs[0].data<void>();
    return [=, scale = scale_, causal = causal_] {
      throw_if_failed(
          moefast_attention(engine(), &queries, &keys, &values, scale, causal, out, queries.dtype));
    };
  }

 private:
  float scale_;
  bool causal_;
};

}  // namespace

mx::array attention(const mx::array& queries,
                    const mx::array& keys,
                    const mx::array& values,
                    float scale,
                    bool causal) {
  for (const auto* array : {&queries, &keys, &values}) {
    if (array->ndim() != 4 || float_dtype(array->dtype()) < 0 ||
        array->dtype() != queries.dtype()) {
      refuse("attention",
             "queries, keys and values must be float arrays of 4 dimensions and one dtype",
             shape_text(*array));
    }
  }
  const bool fits = keys.shape(0) == queries.shape(0) && values.shape(0) == queries.shape(0) &&
                    keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2) &&
                    keys.shape(3) == queries.shape(3) && keys.shape(1) > 0 && keys.shape(2) > 0 &&
                    queries.shape(1) % keys.shape(1) == 0 &&
                    (!causal || keys.shape(2) >= queries.shape(2));
  if (!fits) {
    refuse("attention", "keys and values must fit queries " + shape_text(queries),
           shape_text(keys) + " and " + shape_text(values));
  }
  return mirrored<Attention>(Attention::shape_of(queries, values), queries.dtype(),
                             {queries, keys, values}, scale, causal);
}

}  // namespace moefast::binding
