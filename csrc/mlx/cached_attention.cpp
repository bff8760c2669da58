#include "cached_attention.h"

#include <cstring>
#include <memory>
#include <vector>

#include "call.h"
#include "donation.h"
#include "mirror.h"
#include "plan.h"
#include "rope.h"
#include "spec.h"

namespace moefast::binding {
namespace {

struct Step {
  Rotation rotation;
  int offset;  // rows of the cache that are filled
  float scale;
  bool causal;

  bool operator==(const Step&) const = default;
};

enum Input { kQueries, kKeys, kValues, kCacheKeys, kCacheValues, kFreqs };

// [batch, length, heads * dims] as heads, where it lies.
moefast_heads split_heads(const mx::array& array,
                          int64_t dims,
                          Copies& copies,
                          std::vector<mx::array>& temporaries) {
  const int64_t width = array.shape(2);
  moefast_heads heads{array.data<void>(), float_dtype(array.dtype()),
                      array.shape(0),     width / dims,
                      array.shape(1),     dims,
                      array.strides(0),   dims,
                      array.strides(1)};
  if (width > 1 && array.strides(2) != 1) {
    heads.data = copies.add(array, temporaries);
    heads.row_stride = width;
    heads.batch_stride = width * heads.length;
  }
  return heads;
}

// Rows [begin, begin + length) of the heads of a cache.
moefast_heads rows_of_cache(const mx::array& cache, int64_t begin, int64_t length) {
  moefast_heads heads{
      cache.data<void>(), float_dtype(cache.dtype()), cache.shape(0),   cache.shape(1),  length,
      cache.shape(3),     cache.strides(0),           cache.strides(1), cache.strides(2)};
  heads.data =
      cache.data<char>() + begin * heads.row_stride * static_cast<int64_t>(cache.itemsize());
  return heads;
}

void copy_rows(const moefast_heads& from, const moefast_heads& to) {
  const int64_t size = from.dtype == MOEFAST_FLOAT32 ? 4 : 2;
  const auto* source = static_cast<const char*>(from.data);
  auto* target = static_cast<char*>(const_cast<void*>(to.data));
  for (int64_t b = 0; b < from.batch; ++b) {
    for (int64_t h = 0; h < from.heads; ++h) {
      for (int64_t r = 0; r < from.length; ++r) {
        const int64_t at = b * from.batch_stride + h * from.head_stride + r * from.row_stride;
        const int64_t goal = b * to.batch_stride + h * to.head_stride + r * to.row_stride;
        std::memcpy(target + goal * size, source + at * size,
                    static_cast<size_t>(from.dims * size));
      }
    }
  }
}

class CachedAttention : public Mirror, public Positional {
 public:
  CachedAttention(mx::Stream stream, Step step) : Mirror(stream), step_(step) {}

  const char* name() const override { return "MoefastCachedAttention"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return step_ == static_cast<const CachedAttention&>(other).step_;
  }

  int offset() const override { return step_.offset; }

  std::shared_ptr<Runnable> at(int offset) override {
    Step step = step_;
    step.offset = offset;
    return std::make_shared<CachedAttention>(stream(), step);
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {shape_of(inputs), inputs[kCacheKeys].shape(), inputs[kCacheValues].shape()};
  }

  static mx::Shape shape_of(const Arrays& inputs) {
    const auto& queries = inputs[kQueries];
    const int heads = queries.shape(2) / inputs[kCacheKeys].shape(3);
    return {queries.shape(0), queries.shape(1), heads * inputs[kCacheValues].shape(3)};
  }

 protected:
  const char* operation() const override { return "cached_attention"; }
  size_t num_outputs() const override { return 3; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [step = step_](const Arrays& in) {
      const int end = step.offset + in[kQueries].shape(1);
      const auto freqs = step.rotation.base ? std::nullopt : std::optional<mx::array>(in[kFreqs]);
      const auto split = [](const mx::array& x, int dims) {
        const auto heads = mx::reshape(x, {x.shape(0), x.shape(1), x.shape(2) / dims, dims});
        return mx::transpose(heads, {0, 2, 1, 3});
      };
      const auto put = [&](const mx::array& cache, const mx::array& rows) {
        auto stop = cache.shape();
        stop[2] = end;
        return mx::slice_update(cache, rows, {0, 0, step.offset, 0}, stop);
      };
      const auto filled = [&](const mx::array& cache) {
        auto stop = cache.shape();
        stop[2] = end;
        return mx::slice(cache, {0, 0, 0, 0}, stop);
      };
      const int dims = in[kCacheKeys].shape(3), value_dims = in[kCacheValues].shape(3);
      const auto turned = [&](const mx::array& x) {
        return rotated_by_mlx(split(x, dims), step.rotation, step.offset, freqs);
      };
      const auto keys = put(in[kCacheKeys], turned(in[kKeys]));
      const auto values = put(in[kCacheValues], split(in[kValues], value_dims));
      const auto y =
          mx::fast::scaled_dot_product_attention(turned(in[kQueries]), filled(keys), filled(values),
                                                 step.scale, step.causal ? "causal" : "");
      return Arrays{mx::reshape(mx::transpose(y, {0, 2, 1, 3}), shape_of(in)), keys, values};
    };
  }

  // A cache that nobody else holds gets its rows where it is, even if steps before still run.
  void allocate(const Arrays& inputs, Arrays& outputs, Copies& copies, long references) override {
    give_memory(outputs[0]);
    // Each output of several holds the inputs, too, and lets them go only afterwards.
    for (auto& output : outputs) {
      if (&output.inputs() != &inputs && !output.is_tracer()) {
        output.inputs().clear();
      }
    }
    for (const int i : {1, 2}) {
      const auto& cache = inputs[kCacheKeys + i - 1];
      if (only_held_by_tasks(cache, references) && cache.flags().row_contiguous) {
        outputs[i].copy_shared_buffer(cache);
      } else {
        outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
        copies.add(cache, outputs[i].data<char>());
      }
    }
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto &cache_keys = outputs[1], &cache_values = outputs[2];
    const int64_t dims = cache_keys.shape(3), length = inputs[kQueries].shape(1);
    const auto queries = split_heads(inputs[kQueries], dims, copies, temporaries);
    const auto keys = split_heads(inputs[kKeys], dims, copies, temporaries);
    const auto values = split_heads(inputs[kValues], cache_values.shape(3), copies, temporaries);
    const float* freqs = nullptr;
    if (!step_.rotation.base) {
      freqs = static_cast<const float*>(contiguous(inputs[kFreqs], copies, temporaries));
    }
    mx::array turned(inputs[kQueries].shape(), inputs[kQueries].dtype(), nullptr, {});
    turned.set_data(mx::allocator::malloc(turned.nbytes()));
    temporaries.push_back(turned);
    auto rotated = queries;
    rotated.data = turned.data<void>();
    rotated.row_stride = queries.heads * dims;
    rotated.batch_stride = rotated.row_stride * length;

    const int64_t begin = step_.offset;
    const auto new_keys = rows_of_cache(cache_keys, begin, length);
    const auto new_values = rows_of_cache(cache_values, begin, length);
    const auto all_keys = rows_of_cache(cache_keys, 0, begin + length);
    const auto all_values = rows_of_cache(cache_values, 0, begin + length);
    auto* const out = outputs[0].data<void>();
    return [=, step = step_] {
      const std::vector<int64_t> offsets(static_cast<size_t>(queries.batch), begin);
      rotate(keys, step.rotation, freqs, offsets, new_keys);
      copy_rows(values, new_values);
      rotate(queries, step.rotation, freqs, offsets, rotated);
      throw_if_failed(moefast_attention(engine(), &rotated, &all_keys, &all_values, step.scale,
                                        step.causal, out, rotated.dtype));
    };
  }

 private:
  Step step_;
};

void check(const std::vector<mx::array>& in, int offset) {
  constexpr const char* kName = "cached_attention";
  for (int i = 0; i <= kCacheValues; ++i) {
    const size_t dimensions = i < kCacheKeys ? 3 : 4;
    if (in[i].ndim() != dimensions || float_dtype(in[i].dtype()) < 0 ||
        in[i].dtype() != in[0].dtype()) {
      refuse(
          kName,
          "queries, keys and values must be float arrays of 3 dimensions, caches of 4, and all of "
          "one dtype",
          shape_text(in[i]));
    }
  }
  const auto &q = in[kQueries], &k = in[kKeys], &v = in[kValues];
  const auto &ck = in[kCacheKeys], &cv = in[kCacheValues];
  const int heads = ck.shape(1), dims = ck.shape(3), value_dims = cv.shape(3);
  const bool fits =
      q.shape(1) > 0 && heads > 0 && dims > 0 && value_dims > 0 && k.shape(0) == q.shape(0) &&
      k.shape(1) == q.shape(1) && v.shape(0) == q.shape(0) && v.shape(1) == q.shape(1) &&
      ck.shape(0) == q.shape(0) && cv.shape(0) == q.shape(0) && cv.shape(1) == heads &&
      cv.shape(2) == ck.shape(2) && q.shape(2) % (heads * dims) == 0 &&
      k.shape(2) == heads * dims && v.shape(2) == heads * value_dims;
  if (!fits) {
    refuse(kName, "queries, keys and values must fit the cache " + shape_text(ck),
           shape_text(q) + ", " + shape_text(k) + " and " + shape_text(v));
  }
  if (offset < 0 || offset > ck.shape(2) - q.shape(1)) {
    refuse(kName, "offset + length must be within the cache's " + std::to_string(ck.shape(2)),
           std::to_string(offset) + " + " + std::to_string(q.shape(1)));
  }
}

}  // namespace

std::tuple<mx::array, mx::array, mx::array> cached_attention(const mx::array& queries,
                                                             const mx::array& keys,
                                                             const mx::array& values,
                                                             const mx::array& cache_keys,
                                                             const mx::array& cache_values,
                                                             int offset,
                                                             int rotated,
                                                             bool traditional,
                                                             std::optional<float> base,
                                                             float position_scale,
                                                             const std::optional<mx::array>& freqs,
                                                             float scale,
                                                             bool causal) {
  std::vector<mx::array> inputs = {queries, keys, values, cache_keys, cache_values};
  check(inputs, offset);
  const Rotation rotation{rotated, traditional, base, position_scale};
  if (auto wavelengths = checked_freqs("cached_attention", rotation, cache_keys.shape(3), freqs)) {
    inputs.push_back(std::move(*wavelengths));
  }
  auto primitive = std::make_shared<CachedAttention>(mx::default_stream(mx::default_device()),
                                                     Step{rotation, offset, scale, causal});
  auto outputs = mx::array::make_arrays(
      {CachedAttention::shape_of(inputs), cache_keys.shape(), cache_values.shape()},
      {queries.dtype(), queries.dtype(), queries.dtype()}, primitive, inputs);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace moefast::binding
