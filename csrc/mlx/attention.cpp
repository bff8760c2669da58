#include "attention.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;

// One input as the kernel takes it: values of a head are neighbours in memory. Where they are not,
// which only the evaluation shows, they are copied first.
class Heads {
 public:
  Heads(const mx::array& array, Arrays& temporaries)
      : heads_{array.data<void>(), float_dtype(array.dtype()),
               array.shape(0),     array.shape(1),
               array.shape(2),     array.shape(3),
               array.strides(0),   array.strides(1),
               array.strides(2)} {
    if (array.shape(3) == 1 || array.strides(3) == 1) {
      return;
    }
    from_ = array.data<char>();
    last_stride_ = array.strides(3);
    strides_[0] = heads_.batch_stride;
    strides_[1] = heads_.head_stride;
    strides_[2] = heads_.row_stride;
    mx::array copy(array.shape(), array.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    heads_.data = copy.data<void>();
    heads_.row_stride = heads_.dims;
    heads_.head_stride = heads_.row_stride * heads_.length;
    heads_.batch_stride = heads_.head_stride * heads_.heads;
    temporaries.push_back(std::move(copy));
  }

  const moefast_heads& ready() const {
    if (from_ != nullptr) {
      const int64_t size = heads_.dtype == MOEFAST_FLOAT32 ? 4 : 2;
      auto* to = static_cast<char*>(const_cast<void*>(heads_.data));
      for (int64_t b = 0; b < heads_.batch; ++b) {
        for (int64_t h = 0; h < heads_.heads; ++h) {
          for (int64_t r = 0; r < heads_.length; ++r) {
            const int64_t row = b * strides_[0] + h * strides_[1] + r * strides_[2];
            for (int64_t i = 0; i < heads_.dims; ++i, to += size) {
              std::memcpy(to, from_ + (row + i * last_stride_) * size, static_cast<size_t>(size));
            }
          }
        }
      }
    }
    return heads_;
  }

 private:
  moefast_heads heads_;
  const char* from_ = nullptr;  // where to copy from, in elements
  int64_t last_stride_ = 1;
  int64_t strides_[3] = {};
};

// MLX's own, in the layout of ours.
mx::array by_mlx(const Arrays& inputs, float scale, bool causal) {
  const auto y = mx::fast::scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], scale,
                                                        causal ? "causal" : "");
  const auto by_token = mx::transpose(y, {0, 2, 1, 3});
  return mx::reshape(by_token, {y.shape(0), y.shape(2), y.shape(1) * y.shape(3)});
}

class Attention : public mx::Primitive {
 public:
  Attention(mx::Stream stream, float scale, bool causal)
      : mx::Primitive(stream), scale_(scale), causal_(causal) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) {
      return;
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& input : inputs) {
      encoder.set_input_array(input);
    }
    encoder.set_output_array(out);
    Arrays temporaries;
    const Heads q(inputs[0], temporaries), k(inputs[1], temporaries), v(inputs[2], temporaries);
    encoder.add_temporaries(std::move(temporaries));
    encoder.dispatch([q, k, v, scale = scale_, causal = causal_, to = out.data<void>()] {
      const moefast_heads& queries = q.ready();
      throw_if_failed(moefast_attention(engine(), &queries, &k.ready(), &v.ready(), scale, causal,
                                        to, queries.dtype));
    });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    refuse("attention", "backend 'native' must run on a CPU stream", "a GPU stream");
  }

  Arrays jvp(const Arrays& primals,
             const Arrays& tangents,
             const std::vector<int>& argnums) override {
    return mx::jvp(mlx_of(primals, argnums), pick(primals, argnums), tangents).second;
  }

  Arrays vjp(const Arrays& primals,
             const Arrays& cotangents,
             const std::vector<int>& argnums,
             const Arrays&) override {
    return mx::vjp(mlx_of(primals, argnums), pick(primals, argnums), cotangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override {
    const auto mapped = [this](const Arrays& all) { return Arrays{by_mlx(all, scale_, causal_)}; };
    return {mx::vmap(mapped, axes, {0})(inputs), {0}};
  }

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

 private:
  static Arrays pick(const Arrays& inputs, const std::vector<int>& argnums) {
    Arrays some;
    for (const int i : argnums) {
      some.push_back(inputs[i]);
    }
    return some;
  }

  std::function<Arrays(const Arrays&)> mlx_of(const Arrays& inputs,
                                              const std::vector<int>& argnums) const {
    return [&inputs, &argnums, scale = scale_, causal = causal_](const Arrays& some) {
      Arrays all = inputs;
      for (size_t i = 0; i < argnums.size(); ++i) {
        all[argnums[i]] = some[i];
      }
      return Arrays{by_mlx(all, scale, causal)};
    };
  }

  float scale_;
  bool causal_;
};

std::string shape_text(const mx::array& array) {
  std::string text = "(";
  for (size_t i = 0; i < array.ndim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(array.shape(static_cast<int>(i)));
  }
  return text + ")";
}

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
  return mx::array(
      Attention::shape_of(queries, values), queries.dtype(),
      std::make_shared<Attention>(mx::default_stream(mx::default_device()), scale, causal),
      {queries, keys, values});
}

}  // namespace moefast::binding
