#include "rope.h"

#include "call.h"
#include "mirror.h"
#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

struct Turn {
  int rotated;
  bool traditional;
  std::optional<float> base;
  float scale;
  std::optional<int> offset;  // or an input

  bool operator==(const Turn&) const = default;
};

// Inputs: x, the offsets unless the turn has one, the freqs unless it has a base.
class Rope : public Mirror {
 public:
  Rope(mx::Stream stream, Turn turn) : Mirror(stream), turn_(turn) {}

  const char* name() const override { return "MoefastRope"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return turn_ == static_cast<const Rope&>(other).turn_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }

 protected:
  const char* operation() const override { return "rope"; }

  std::function<mx::array(const Arrays&)> by_mlx() const override {
    return [turn = turn_](const Arrays& in) {
      const auto freqs = turn.base ? std::nullopt : std::optional<mx::array>(in.back());
      const auto run = [&](const auto& offset) {
        return mx::fast::rope(in[0], turn.rotated, turn.traditional, turn.base, turn.scale, offset,
                              freqs);
      };
      return turn.offset ? run(*turn.offset) : run(in[1]);
    };
  }

  std::function<void()> work(const Arrays& inputs,
                             void* out,
                             Copies& copies,
                             Arrays& temporaries) const override {
    const auto x = heads_of(inputs[0], copies, temporaries);
    const auto offsets = turn_.offset ? View{} : view_of(inputs[1]);
    const auto* freqs =
        turn_.base ? nullptr
                   : static_cast<const float*>(contiguous(inputs.back(), copies, temporaries));
    return [=, turn = turn_] {
      std::vector<int64_t> first;
      if (turn.offset) {
        first.assign(static_cast<size_t>(x.batch), *turn.offset);
      } else {
        const auto* values = reinterpret_cast<const int32_t*>(offsets.data);
        each(offsets, 0, 0, [&](int64_t at) { first.push_back(values[at]); });
        first.resize(static_cast<size_t>(x.batch), first.back());  // one for all
      }
      throw_if_failed(moefast_rope(engine(), &x, turn.rotated, turn.traditional, freqs,
                                   turn.base.value_or(0.0f), turn.scale, first.data(), out));
    };
  }

 private:
  Turn turn_;
};

}  // namespace

mx::array rope(const mx::array& x,
               int rotated,
               bool traditional,
               std::optional<float> base,
               float scale,
               const std::variant<int, mx::array>& offset,
               const std::optional<mx::array>& freqs) {
  if (x.ndim() != 4 || float_dtype(x.dtype()) < 0) {
    refuse("rope", "x must be a float array of 4 dimensions", shape_text(x));
  }
  if (rotated < 2 || rotated % 2 != 0 || rotated > x.shape(3)) {
    refuse("rope", "dims must be even and in 2.." + std::to_string(x.shape(3)),
           std::to_string(rotated));
  }
  if (base.has_value() == freqs.has_value()) {
    refuse("rope", "either base or freqs must be given", base ? "both" : "neither");
  }
  Turn turn{rotated, traditional, base, scale, std::nullopt};
  std::vector<mx::array> inputs = {x};
  if (const auto* number = std::get_if<int>(&offset)) {
    turn.offset = *number;
  } else {
    const auto& offsets = std::get<mx::array>(offset);
    if (!mx::issubdtype(offsets.dtype(), mx::integer) ||
        (offsets.size() != 1 && static_cast<int>(offsets.size()) != x.shape(0)) ||
        offsets.ndim() > 1) {
      refuse("rope", "offset must be an integer or [batch] of them", shape_text(offsets));
    }
    inputs.push_back(mx::astype(offsets, mx::int32));
  }
  if (freqs) {
    if (freqs->ndim() != 1 || freqs->shape(0) != rotated / 2) {
      refuse("rope", "freqs must have " + std::to_string(rotated / 2) + " values",
             shape_text(*freqs));
    }
    inputs.push_back(mx::astype(*freqs, mx::float32));
  }
  return mirrored<Rope>(x.shape(), x.dtype(), std::move(inputs), turn);
}

}  // namespace moefast::binding
