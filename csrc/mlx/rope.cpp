#include "rope.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

// Inputs: x, the offsets unless one for all is known, the freqs unless there is a base.
class Rope : public Mirror {
 public:
  Rope(mx::Stream stream, Rotation rotation, std::optional<int> offset)
      : Mirror(stream), rotation_(rotation), offset_(offset) {}

  const char* name() const override { return "MoefastRope"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& same = static_cast<const Rope&>(other);
    return rotation_ == same.rotation_ && offset_ == same.offset_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }

 protected:
  const char* operation() const override { return "rope"; }

  std::function<Arrays(const Arrays&)> by_mlx() const override {
    return [rotation = rotation_, offset = offset_](const Arrays& in) {
      const auto freqs = rotation.base ? std::nullopt : std::optional<mx::array>(in.back());
      return Arrays{offset ? rotated_by_mlx(in[0], rotation, *offset, freqs)
                           : rotated_by_mlx(in[0], rotation, in[1], freqs)};
    };
  }

  std::function<void()> work(const Arrays& inputs,
                             Arrays& outputs,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto x = heads_of(inputs[0], copies, temporaries);
    const auto offsets = offset_ ? View{} : view_of(inputs[1]);
    const auto* freqs =
        rotation_.base ? nullptr
                       : static_cast<const float*>(contiguous(inputs.back(), copies, temporaries));
    moefast_heads out = x;
    out.data = outputs[0].data<void>();
    out.row_stride = x.dims;
    out.head_stride = x.dims * x.length;
    out.batch_stride = out.head_stride * x.heads;
    return [=, rotation = rotation_, offset = offset_] {
      std::vector<int64_t> first;
      if (offset) {
        first.assign(static_cast<size_t>(x.batch), *offset);
      } else {
        const auto* values = reinterpret_cast<const int32_t*>(offsets.data);
        each(offsets, 0, 0, [&](int64_t at) { first.push_back(values[at]); });
        first.resize(static_cast<size_t>(x.batch), first.back());  // one for all
      }
      rotate(x, rotation, freqs, first, out);
    };
  }

 private:
  Rotation rotation_;
  std::optional<int> offset_;
};

}  // namespace

mx::array rotated_by_mlx(const mx::array& x,
                         const Rotation& rotation,
                         const std::variant<int, mx::array>& offset,
                         const std::optional<mx::array>& freqs) {
  const auto run = [&](const auto& from) {
    return mx::fast::rope(x, rotation.dims, rotation.traditional, rotation.base, rotation.scale,
                          from, freqs);
  };
  return std::visit(run, offset);
}

void rotate(const moefast_heads& x,
            const Rotation& rotation,
            const float* freqs,
            const std::vector<int64_t>& offsets,
            const moefast_heads& out) {
  throw_if_failed(moefast_rope(engine(), &x, rotation.dims, rotation.traditional, freqs,
                               rotation.base.value_or(0.0f), rotation.scale, offsets.data(), &out));
}

std::optional<mx::array> checked_freqs(const char* operation,
                                       const Rotation& rotation,
                                       int head_dim,
                                       const std::optional<mx::array>& freqs) {
  if (rotation.dims < 2 || rotation.dims % 2 != 0 || rotation.dims > head_dim) {
    refuse(operation, "dims must be even and in 2.." + std::to_string(head_dim),
           std::to_string(rotation.dims));
  }
  if (rotation.base.has_value() == freqs.has_value()) {
    refuse(operation, "either base or freqs must be given", freqs ? "both" : "neither");
  }
  if (!freqs) {
    return std::nullopt;
  }
  if (freqs->ndim() != 1 || freqs->shape(0) != rotation.dims / 2) {
    refuse(operation, "freqs must have " + std::to_string(rotation.dims / 2) + " values",
           shape_text(*freqs));
  }
  return mx::astype(*freqs, mx::float32);
}

mx::array rope(const mx::array& x,
               int dims,
               bool traditional,
               std::optional<float> base,
               float scale,
               const std::variant<int, mx::array>& offset,
               const std::optional<mx::array>& freqs) {
  if (x.ndim() != 4 || float_dtype(x.dtype()) < 0) {
    refuse("rope", "x must be a float array of 4 dimensions", shape_text(x));
  }
  const Rotation rotation{dims, traditional, base, scale};
  const auto wavelengths = checked_freqs("rope", rotation, x.shape(3), freqs);
  std::vector<mx::array> inputs = {x};
  std::optional<int> first;
  if (const auto* number = std::get_if<int>(&offset)) {
    first = *number;
  } else {
    const auto& offsets = std::get<mx::array>(offset);
    if (!mx::issubdtype(offsets.dtype(), mx::integer) ||
        (offsets.size() != 1 && static_cast<int>(offsets.size()) != x.shape(0)) ||
        offsets.ndim() > 1) {
      refuse("rope", "offset must be an integer or [batch] of them", shape_text(offsets));
    }
    inputs.push_back(mx::astype(offsets, mx::int32));
  }
  if (wavelengths) {
    inputs.push_back(*wavelengths);
  }
  return mirrored<Rope>(x.shape(), x.dtype(), std::move(inputs), rotation, first);
}

}  // namespace moefast::binding
