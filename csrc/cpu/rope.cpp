// moefast_rope: rotary positions.
//
// Angles grow with the position, to 10^5 and beyond, where a float32 has lost a hundredth: they are
// made and reduced in float64, sine and cosine are then polynomials in float32.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <limits>

#include "check.h"
#include "engine.h"
#include "heads.h"

namespace moefast {
namespace {

// Values that one piece of work takes, about.
constexpr int64_t kPieceValues = 16 << 10;

struct Angle {
  float cosine;
  float sine;
};

Angle angle_of(double radians) {
  constexpr double kQuarters = 0.63661977236758134308;  // 2 / pi
  constexpr double kQuarter = 1.57079632679489661923;
  const double quarters = std::nearbyint(radians * kQuarters);
  if (!(std::fabs(quarters) < 9e15)) {  // infinite, or not a number
    constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
    return {kNone, kNone};
  }
  const auto x = static_cast<float>(radians - quarters * kQuarter);  // |x| <= pi / 4
  const float square = x * x;
  float sine = square * -1.9515295891e-4f + 8.3321608736e-3f;
  sine = sine * square - 1.6666654611e-1f;
  sine = sine * square * x + x;
  float cosine = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
  cosine = cosine * square + 4.166664568298827e-2f;
  cosine = cosine * square * square - 0.5f * square + 1.0f;
  switch (static_cast<int64_t>(quarters) & 3) {
    case 0:
      return {cosine, sine};
    case 1:
      return {-sine, cosine};
    case 2:
      return {-cosine, -sine};
    default:
      return {sine, -cosine};
  }
}

class Run {
 public:
  Run(moefast_engine& engine,
      const moefast_heads& x,
      int64_t rotated,
      bool traditional,
      const int64_t* offsets,
      const moefast_heads& out)
      : engine_(engine),
        x_(x),
        pairs_(rotated / 2),
        traditional_(traditional),
        offsets_(offsets),
        out_(out) {
    out_.dtype = x.dtype;
  }

  void operator()(const float* freqs, float base, float scale) {
    auto* speeds = engine_.scratch.take<double>(pairs_);
    const double step = -std::log(static_cast<double>(base)) / static_cast<double>(pairs_);
    for (int64_t i = 0; i < pairs_; ++i) {
      const double speed = freqs ? 1.0 / freqs[i] : std::exp(step * static_cast<double>(i));
      speeds[i] = speed * scale;
    }
    speeds_ = speeds;
    const int64_t step_rows = std::max<int64_t>(1, kPieceValues / (x_.heads * x_.dims));
    const int64_t pieces = (x_.length + step_rows - 1) / step_rows;
    const int64_t size = round_up(x_.dims + 2 * pairs_, 16);
    auto* work = engine_.scratch.take<float>(engine_.pool.threads() * size);
    engine_.pool.run(x_.batch * pieces, [&](int64_t item, int64_t, int thread) {
      const int64_t first = item % pieces * step_rows;
      const int64_t end = std::min(x_.length, first + step_rows);
      for (int64_t row = first; row < end; ++row) {
        turn(item / pieces, row, work + thread * size);
      }
    });
  }

 private:
  // All heads of one position.
  void turn(int64_t batch, int64_t row, float* values) const {
    float* cosines = values + x_.dims;
    float* sines = cosines + pairs_;
    const auto position = static_cast<double>(offsets_[batch] + row);
    for (int64_t i = 0; i < pairs_; ++i) {
      const Angle angle = angle_of(position * speeds_[i]);
      cosines[i] = angle.cosine;
      sines[i] = angle.sine;
    }
    const int64_t next = traditional_ ? 2 : 1, other = traditional_ ? 1 : pairs_;
    for (int64_t head = 0; head < x_.heads; ++head) {
      engine_.isa.widen(x_.dtype, row_of(x_, batch, head, row), x_.dims, values);
      for (int64_t i = 0; i < pairs_; ++i) {
        const float a = values[i * next], b = values[i * next + other];
        values[i * next] = a * cosines[i] - b * sines[i];
        values[i * next + other] = a * sines[i] + b * cosines[i];
      }
      auto* to = const_cast<uint8_t*>(row_of(out_, batch, head, row));
      engine_.isa.narrow(x_.dtype, values, x_.dims, to);
    }
  }

  moefast_engine& engine_;
  const moefast_heads& x_;
  const int64_t pairs_;
  const bool traditional_;
  const int64_t* const offsets_;
  moefast_heads out_;
  const double* speeds_ = nullptr;  // radians a position
};

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" int moefast_rope(moefast_engine* engine,
                            const moefast_heads* x,
                            int64_t rotated,
                            int32_t traditional,
                            const float* freqs,
                            float base,
                            float scale,
                            const int64_t* offsets,
                            const moefast_heads* out) {
  return run_on(engine, "rope", [&](moefast_engine& on) {
    check_pointer("x", x);
    check_heads("x", *x);
    if (rotated < 2 || rotated % 2 != 0 || rotated > x->dims) {
      refuse("rotated must be even and in 2..%" PRId64 ", got %" PRId64 ".", x->dims, rotated);
    }
    if (freqs == nullptr && !(base > 0.0f)) {
      refuse("base must be above 0, got %g.", static_cast<double>(base));
    }
    if (x->batch == 0 || x->length == 0) {
      return;
    }
    check_pointer("offsets", offsets);
    check_pointer("out", out);
    check_pointer("out", out->data);
    Run(on, *x, rotated, traditional != 0, offsets, *out)(freqs, base, scale);
  });
}
