// Conversions, activations and sums of every instruction set of this build and machine.
//
// Conversions: all 65536 halves, and floats between any two of them, against arithmetic in float64.
// Activations: the formulas of moefast_activation in float64 over all magnitudes, infinity and NaN.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "guarded.h"
#include "isas.h"
#include "weights.h"

namespace moefast::testing {
namespace {

int failures = 0;

void report(bool passed, const char* isa, const char* what, const char* figures = "") {
  failures += !passed;
  std::printf("%-8s %-20s %s%s\n", isa, what, passed ? "ok" : "FAILED", figures);
}

float single(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

void check_widen(const Isa& isa, int dtype) {
  const int64_t count = 65536 + 3;  // not a whole number of vectors
  const Guarded halves(static_cast<size_t>(2 * count)), floats(static_cast<size_t>(4 * count));
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = static_cast<uint16_t>(i);
    std::memcpy(halves.data() + 2 * i, &half, 2);
  }
  float* to = reinterpret_cast<float*>(floats.data());
  isa.widen(dtype, halves.data(), count, to);
  bool passed = true;
  for (int64_t i = 0; i < count; ++i) {
    passed = passed && same(to[i], value_of(dtype, halves.data() + 2 * i));
  }
  report(passed, isa.name, dtype == MOEFAST_FLOAT16 ? "widen float16" : "widen bfloat16");
}

// The halves next to x on either side, and which of them is right: the nearest, of two the even
// one.
bool rounds_right(int dtype, float x, uint16_t got) {
  if (std::isnan(x)) {
    return std::isnan(half_value(dtype, got));
  }
  const int infinity = dtype == MOEFAST_FLOAT16 ? 0x7c00 : 0x7f80;
  const int magnitude = got & 0x7fff;
  if ((got >> 15 != 0) != std::signbit(x) || magnitude > infinity) {
    return false;
  }
  const auto value = [&](int code) {
    // The step beyond the largest number counts as a number, and stands for infinity.
    return code != infinity           ? half_value(dtype, static_cast<uint16_t>(code))
           : dtype == MOEFAST_FLOAT16 ? 0x1p16
                                      : 0x1p128;
  };
  if (std::isinf(x)) {
    return magnitude == infinity;
  }
  const double size = std::fabs(static_cast<double>(x));
  if (magnitude == infinity && size >= value(infinity)) {
    return true;
  }
  const double distance = std::fabs(value(magnitude) - size);
  for (int other : {magnitude - 1, magnitude + 1}) {
    if (other < 0 || other > infinity) {
      continue;
    }
    const double theirs = std::fabs(value(other) - size);
    if (theirs < distance || (theirs == distance && magnitude % 2 != 0)) {
      return false;
    }
  }
  return true;
}

void check_narrow(const Isa& isa, int dtype) {
  std::vector<float> floats;
  for (uint32_t half = 0; half < 65536; ++half) {
    const float x = static_cast<float>(half_value(dtype, static_cast<uint16_t>(half)));
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Itself, next to it, and about half way to the next.
    const uint32_t step = dtype == MOEFAST_FLOAT16 ? 1u << 13 : 1u << 16;
    for (uint32_t more : {0u, 1u, step / 2 - 1, step / 2, step / 2 + 1, step - 1}) {
      floats.push_back(single(bits + more));
    }
  }
  for (uint32_t i = 0; i < 1u << 16; ++i) {  // all magnitudes, subnormals of float16 among them
    floats.push_back(single(i * 65521u));
  }
  floats.insert(floats.end(), {0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1.000002p-25f, 65519.f, 65520.f});
  const Guarded halves(2 * floats.size());
  isa.narrow(dtype, floats.data(), static_cast<int64_t>(floats.size()), halves.data());
  bool passed = true;
  for (size_t i = 0; i < floats.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, halves.data() + 2 * i, 2);
    if (!rounds_right(dtype, floats[i], half) && passed) {
      std::printf("%a becomes %#x\n", static_cast<double>(floats[i]), half);
      passed = false;
    }
  }
  report(passed, isa.name, dtype == MOEFAST_FLOAT16 ? "narrow float16" : "narrow bfloat16");
}

double sigmoid(double x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

double gelu_tanh(double x) {  // 0.5 x (1 + tanh z), as x sigmoid(2 z)
  return x * sigmoid(2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
}

double truth(const moefast_activation& a, double g, double u) {
  const double limit = a.limit, capped = std::min(g, limit);
  const double clipped = std::clamp(u, -limit, limit);
  switch (a.kind) {
    case MOEFAST_SWIGLU:
      return g * sigmoid(g) * u;
    case MOEFAST_SWIGLU_OAI:
      return (clipped + 1) * capped * sigmoid(a.alpha * capped);
    case MOEFAST_SWIGLU_CLIPPED:
      return std::min(g * sigmoid(g), limit) * clipped;
    case MOEFAST_SWIGLU_CLAMPED:
      return capped * sigmoid(capped) * clipped;
    case MOEFAST_GEGLU_TANH:
      return gelu_tanh(g) * u;
    case MOEFAST_SITU: {
      const double linear = a.linear_beta;
      const double bounded = a.beta * std::tanh(g / a.beta) * sigmoid(g);
      return bounded * (std::isnan(linear) ? u : linear * std::tanh(u / linear));
    }
    case MOEFAST_GELU_TANH:
      return gelu_tanh(u);
    default:
      return u <= 0 ? 0 : u * u;
  }
}

struct Named {
  const char* name;
  double ulps;  // as many as steps, each with an error of one to two
  moefast_activation activation;
};

const Named kActivations[] = {
    {"swiglu", 4, {MOEFAST_SWIGLU, 1.702f, 7, 1, NAN}},
    {"swiglu_oai", 5, {MOEFAST_SWIGLU_OAI, 1.702f, 7, 1, NAN}},
    {"swiglu_clipped", 4, {MOEFAST_SWIGLU_CLIPPED, 1.702f, 7, 1, NAN}},
    {"swiglu_clamped", 4, {MOEFAST_SWIGLU_CLAMPED, 1.702f, 10, 1, NAN}},
    {"geglu_tanh", 4, {MOEFAST_GEGLU_TANH, 1.702f, 7, 1, NAN}},
    {"situ", 6, {MOEFAST_SITU, 1.702f, 7, 4, NAN}},
    {"situ, linear_beta", 9, {MOEFAST_SITU, 1.702f, 7, 4, 25}},
    {"gelu_tanh", 3, {MOEFAST_GELU_TANH, 1.702f, 7, 1, NAN}},
    {"relu2", 1, {MOEFAST_RELU2, 1.702f, 7, 1, NAN}},
};

// Errors in units of the last place of the result, or of float32's smallest normal number. A
// sigmoid whose exp has overflowed is 0 instead of what is left below 2^-126; of what it is
// multiplied with no more is asked.
double ulps(double got, double want) {
  const double size = std::max(std::fabs(want), 0x1p-126);
  return std::fabs(got - want) / std::ldexp(1.0, std::ilogb(size) - 23);
}

void check_activation(const Isa& isa, const Named& named) {
  const moefast_activation& a = named.activation;
  const bool gated = a.kind != MOEFAST_GELU_TANH && a.kind != MOEFAST_RELU2;
  Random random(7);
  std::vector<float> gates, ups;
  for (int i = 0; i < 200001; ++i) {  // not a whole number of vectors
    const double size = std::pow(10, -6 + 8 * random.uniform());
    gates.push_back(static_cast<float>(size * random.normal()));
    ups.push_back(static_cast<float>((gated ? 1 : size) * random.normal()));
  }
  std::vector<float> got = ups;
  isa.activate(a, gated ? gates.data() : nullptr, got.data(), static_cast<int64_t>(got.size()));
  double near = 0, far = 0;
  bool passed = true;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = gated ? gates[i] : ups[i];
    const double want = truth(a, gates[i], ups[i]);
    // Where the sigmoid decays, its argument's own rounding is amplified.
    const double decay = a.kind == MOEFAST_GEGLU_TANH || a.kind == MOEFAST_GELU_TANH
                             ? std::fabs(1.6 * x + 0.072 * x * x * x)
                         : a.kind == MOEFAST_SWIGLU_OAI ? 1.702 * std::fabs(x)
                                                        : 0;
    if (std::fabs(want) < 0x1p-120 && std::fabs(got[i]) < 0x1p-120) {
      continue;
    }
    const double error = ulps(got[i], want);
    if (x < 0 && decay > 1) {
      far = std::max(far, error / decay);
    } else {
      near = std::max(near, error);
    }
    passed = passed && std::isfinite(got[i]);
  }
  passed = passed && near <= named.ulps && far <= 4;
  if (computes_like_portable(isa)) {
    std::vector<float> theirs = ups;
    isa_portable()->activate(a, gated ? gates.data() : nullptr, theirs.data(),
                             static_cast<int64_t>(theirs.size()));
    passed = passed && std::memcmp(got.data(), theirs.data(), 4 * got.size()) == 0;
  }
  char figures[80];
  std::snprintf(figures, sizeof figures, "  %.2f ulp, %.2f per unit of a negative exponent", near,
                far);
  report(passed, isa.name, named.name, figures);
}

// Infinity and NaN go where the formulas of MLX take them.
void check_extremes(const Isa& isa, const Named& named) {
  const moefast_activation& a = named.activation;
  const float inf = INFINITY;
  const float inputs[] = {inf, -inf, NAN, -1e30f, 1e30f, -88.5f, 88.5f, -100, 100, -0.0f, 0};
  for (float x : inputs) {
    const bool gated = a.kind != MOEFAST_GELU_TANH && a.kind != MOEFAST_RELU2;
    const bool capped = a.kind == MOEFAST_SWIGLU_OAI || a.kind == MOEFAST_SWIGLU_CLAMPED ||
                        a.kind == MOEFAST_SWIGLU_CLIPPED;
    float up = gated ? 1.0f : x;
    isa.activate(a, gated ? &x : nullptr, &up, 1);
    bool right;
    if (std::isnan(x)) {
      right = std::isnan(up);
    } else if (x == inf || x == 1e30f) {
      right = a.kind == MOEFAST_SITU || capped ? std::isfinite(up) && up > 0 : up >= 1e30f;
    } else if (x == -inf) {  // -inf * 0, but for a bounded or rectified one
      right = a.kind == MOEFAST_SITU || a.kind == MOEFAST_RELU2 ? up == 0 : std::isnan(up);
    } else if (x <= -88) {
      right = std::fabs(up) <= 1e-30f;
    } else {
      right = std::isfinite(up) && (x != 0 || up == 0);
    }
    if (!right) {
      std::printf("%s(%g) = %g\n", named.name, static_cast<double>(x), static_cast<double>(up));
      report(false, isa.name, named.name);
    }
  }
}

void check_add_scaled(const Isa& isa) {
  bool passed = true;
  for (int64_t count = 0; count < 70; ++count) {
    const size_t bytes = static_cast<size_t>(4 * count);
    const Guarded x(bytes), y(bytes);
    std::vector<float> before;
    Random random(static_cast<uint64_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      put(MOEFAST_FLOAT32, random.normal(), x.data() + 4 * i);
      put(MOEFAST_FLOAT32, random.normal(), y.data() + 4 * i);
      before.push_back(static_cast<float>(value_of(MOEFAST_FLOAT32, y.data() + 4 * i)));
    }
    isa.add_scaled(0.7f, reinterpret_cast<float*>(x.data()), count,
                   reinterpret_cast<float*>(y.data()));
    for (int64_t i = 0; i < count; ++i) {
      const double term = 0.7f * value_of(MOEFAST_FLOAT32, x.data() + 4 * i);
      const double old = before[static_cast<size_t>(i)];
      const double error = value_of(MOEFAST_FLOAT32, y.data() + 4 * i) - (old + term);
      passed = passed && std::fabs(error) <= 1.2e-7 * (std::fabs(old) + std::fabs(term));
    }
  }
  report(passed, isa.name, "add_scaled");
}

void check_measurements(const Isa& isa) {
  bool passed = isa.flops(1000) > 1000;
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{255}, size_t{256}, size_t{5000}}) {
    const Guarded memory(bytes);
    isa.read(memory.data(), bytes);
  }
  report(passed, isa.name, "read, flops");
}

}  // namespace
}  // namespace moefast::testing

int main() {
  using namespace moefast;
  using namespace moefast::testing;
  for (const Isa* each : isas()) {
    const Isa& isa = *each;
    for (int dtype : {MOEFAST_FLOAT16, MOEFAST_BFLOAT16}) {
      check_widen(isa, dtype);
      check_narrow(isa, dtype);
    }
    for (const Named& named : kActivations) {
      check_activation(isa, named);
      check_extremes(isa, named);
    }
    check_add_scaled(isa);
    check_measurements(isa);
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
