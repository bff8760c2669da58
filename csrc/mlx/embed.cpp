#include "embed.h"

#include <algorithm>

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Maybe = std::optional<mx::array>;

struct Packing {
  int group_size;
  int bits;
  std::string mode;
  int32_t form;  // enum moefast_mode

  bool operator==(const Packing&) const = default;

  bool affine() const { return form == MOEFAST_AFFINE; }
  int dims(const mx::array& scales) const { return scales.shape(1) * group_size; }
  mx::Shape shape(const mx::array& indices, const mx::array& scales) const {
    mx::Shape shape = indices.shape();
    shape.push_back(dims(scales));
    return shape;
  }
  mx::Dtype dtype(const mx::array& scales) const {
    return affine() ? scales.dtype() : mx::bfloat16;
  }
};

// MLX takes neither a vector nor no rows at all. Of a weight with a global scale it makes float32.
mx::array by_mlx_of(const Packing& packing, const std::vector<mx::array>& in) {
  const auto &indices = in[0], &scales = in[2];
  const auto shape = packing.shape(indices, scales);
  const auto dtype = packing.dtype(scales);
  if (indices.size() == 0) {
    return mx::zeros(shape, dtype);
  }
  const auto flat = mx::flatten(indices);
  const auto rows = [&](const mx::array& of) { return mx::take(of, flat, 0); };
  const bool more = in.size() > 3;
  const auto biases = packing.affine() ? Maybe(rows(in[3])) : std::nullopt;
  const auto global_scale = more && !packing.affine() ? Maybe(in[3]) : std::nullopt;
  const auto y = mx::dequantize(rows(in[1]), rows(scales), biases, packing.group_size, packing.bits,
                                packing.mode, global_scale, global_scale ? mx::float32 : dtype);
  return mx::astype(mx::reshape(y, shape), dtype);
}

// Inputs: indices, weight, scales, and affine biases or nvfp4's global scale.
class Embed : public Mirror {
 public:
  Embed(mx::Stream stream, Packing packing) : Mirror(stream), packing_(std::move(packing)) {}

  const char* name() const override { return "MoefastEmbed"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return packing_ == static_cast<const Embed&>(other).packing_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {packing_.shape(inputs[0], inputs[2])};
  }

  // Over indices alone it is a lookup of more of them; MLX has no vmap for fp8.
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override {
    if (std::any_of(axes.begin() + 1, axes.end(), [](int axis) { return axis >= 0; })) {
      return Mirror::vmap(inputs, axes);
    }
    Arrays moved = inputs;
    moved[0] = mx::moveaxis(inputs[0], axes[0], 0);
    auto shape = packing_.shape(moved[0], moved[2]);
    const auto dtype = packing_.dtype(moved[2]);
    return {{mirrored<Embed>(std::move(shape), dtype, std::move(moved), packing_)}, {0}};
  }

 protected:
  const char* operation() const override { return "embed"; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return
        [packing = packing_](const Arrays& inputs) { return Arrays{by_mlx_of(packing, inputs)}; };
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto memory = [&](size_t i) { return contiguous(inputs[i], copies, temporaries); };
    moefast_projection weight{};
    weight.mode = packing_.form;
    weight.bits = packing_.bits;
    weight.group_size = packing_.group_size;
    weight.dtype = std::max(float_dtype(inputs[2].dtype()), 0);
    weight.out_dims = inputs[1].shape(0);
    weight.in_dims = packing_.dims(inputs[2]);
    weight.weight = memory(1);
    weight.scales = memory(2);
    if (packing_.affine()) {
      weight.biases = memory(3);
    } else if (inputs.size() > 3) {
      weight.global_scale = static_cast<const float*>(memory(3));
    }
    const auto dtype = float_dtype(packing_.dtype(inputs[2]));
    auto* const out = outputs[0].data<void>();
    return [=, indices = view_of(inputs[0])] {
      auto rows = read_indices("embed", indices, -weight.out_dims, weight.out_dims - 1);
      for (auto& row : rows) {
        row += row < 0 ? static_cast<int32_t>(weight.out_dims) : 0;
      }
      throw_if_failed(moefast_embed(engine(), &weight, rows.data(),
                                    static_cast<int64_t>(rows.size()), out, dtype));
    };
  }

 private:
  Packing packing_;
};

// Everything that memory is read by; that the format is one there is, the kernel checks.
void check(const Packing& packing,
           const mx::array& indices,
           const mx::array& weight,
           const mx::array& scales,
           const Maybe& biases,
           const Maybe& global_scale) {
  if (!mx::issubdtype(indices.dtype(), mx::integer)) {
    refuse("embed", "indices must be integers", shape_text(indices));
  }
  if (weight.ndim() != 2 || weight.dtype() != mx::uint32 || weight.shape(0) == 0 ||
      scales.ndim() != 2 || scales.shape(0) != weight.shape(0) || packing.group_size < 1 ||
      int64_t{scales.shape(1)} * packing.group_size * packing.bits !=
          int64_t{weight.shape(1)} * 32) {
    refuse("embed", "weight must be packed uint32 [rows, dims], and scales must fit it",
           shape_text(weight) + " and " + shape_text(scales));
  }
  const bool fits = packing.affine()
                        ? biases && biases->shape() == scales.shape() &&
                              biases->dtype() == scales.dtype() && float_dtype(scales.dtype()) >= 0
                        : !biases && scales.dtype() == mx::uint8;
  if (!fits) {
    refuse("embed", "scales and biases must be those of mode '" + packing.mode + "'",
           shape_text(scales) + " and " + (biases ? shape_text(*biases) : "none"));
  }
  if (global_scale && (packing.form != MOEFAST_NVFP4 || global_scale->ndim() != 0 ||
                       global_scale->dtype() != mx::float32)) {
    refuse("embed", "global_scale must be a float32 number of mode 'nvfp4'",
           shape_text(*global_scale));
  }
}

}  // namespace

mx::array embed(const mx::array& indices,
                const mx::array& weight,
                const mx::array& scales,
                const Maybe& biases,
                const Maybe& global_scale,
                int group_size,
                int bits,
                const std::string& mode) {
  Packing packing{group_size, bits, mode, value_of("embed", kModes, mode)};
  check(packing, indices, weight, scales, biases, global_scale);
  std::vector<mx::array> inputs = {indices, weight, scales};
  for (const auto* more : {&biases, &global_scale}) {
    if (*more) {
      inputs.push_back(**more);
    }
  }
  auto shape = packing.shape(indices, scales);
  const auto dtype = packing.dtype(scales);
  return mirrored<Embed>(std::move(shape), dtype, std::move(inputs), std::move(packing));
}

nb::object embed_of(int group_size,
                    int bits,
                    const std::string& mode,
                    bool has_global_scale,
                    const mx::array& indices,
                    nb::handle layer,
                    nb::handle type,
                    size_t low,
                    size_t high) {
  const bool affine = mode == "affine";
  Weight there{};  // of which only what there is counts
  there.biases = affine ? 0 : -1;
  there.scales = 0;
  there.global_scale = has_global_scale ? 0 : -1;
  Gathered gathered;
  if (indices.size() < low || indices.size() > high || mx::default_device() != mx::Device::cpu ||
      !append_layer(layer, type, there, gathered)) {
    return nb::none();
  }
  const auto& found = gathered.arrays;
  const auto last = found.size() > 2 ? Maybe(found[2]) : std::nullopt;
  try {
    return nb::cast(embed(indices, found[0], found[1], affine ? last : std::nullopt,
                          affine ? std::nullopt : last, group_size, bits, mode));
  } catch (const std::invalid_argument&) {
    return nb::none();
  }
}

}  // namespace moefast::binding
