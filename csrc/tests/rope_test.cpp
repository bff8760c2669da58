// Rotary positions on every instruction set of this build and machine, against float64.
//
// All dtypes, pairs of either order, rows that are turned in part; far positions, frequencies of
// their own; rows apart from one another, beside pages that must not be touched; the same bits from
// any number of threads.
#include <cmath>
#include <limits>
#include <vector>

#include "engines.h"
#include "random_heads.h"

namespace moefast::testing {
namespace {

constexpr float kBase = 10000;

struct Case {
  int64_t batch, heads, length, dims, rotated;
  bool traditional;
  int dtype;
  int64_t offset;
  bool freqs;  // given, not made of the base
};

float freq(int64_t pair) {
  return 1 + 13.7f * static_cast<float>(pair);
}

std::vector<double> expected(const Case& c, const Heads& heads, float scale) {
  std::vector<double> x = heads.values();
  const int64_t pairs = c.rotated / 2;
  for (size_t row = 0; row < x.size() / static_cast<size_t>(c.dims); ++row) {
    const int64_t batch = static_cast<int64_t>(row) / (c.heads * c.length);
    const int64_t position = c.offset + 2 * batch + static_cast<int64_t>(row) % c.length;
    double* values = &x[row * static_cast<size_t>(c.dims)];
    for (int64_t i = 0; i < pairs; ++i) {
      const double wave = c.freqs ? static_cast<double>(freq(i))
                                  : std::pow(static_cast<double>(kBase),
                                             static_cast<double>(i) / static_cast<double>(pairs));
      const double angle = static_cast<double>(scale) * static_cast<double>(position) / wave;
      double& a = values[c.traditional ? 2 * i : i];
      double& b = values[c.traditional ? 2 * i + 1 : pairs + i];
      const double turned = a * std::cos(angle) - b * std::sin(angle);
      b = a * std::sin(angle) + b * std::cos(angle);
      a = turned;
    }
  }
  return x;
}

// Float32 arithmetic on normal values, and the output's rounding.
double allowed(int dtype, double value) {
  const double rounding = dtype == MOEFAST_FLOAT32   ? 0x1p-23
                          : dtype == MOEFAST_FLOAT16 ? 0x1p-11
                                                     : 0x1p-8;
  return 2e-6 + rounding * 1.001 * std::fabs(value);
}

void check(const Case& c, uint64_t seed) {
  const Heads x(c.dtype, c.batch, c.heads, c.length, c.dims, static_cast<int64_t>(seed % 4),
                seed % 3 == 0, seed);
  const float scale = seed % 2 ? 1.0f : 0.25f;
  const std::vector<double> want = expected(c, x, scale);
  std::vector<float> freqs;
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < c.rotated / 2; ++i) {
    freqs.push_back(freq(i));
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    offsets.push_back(c.offset + 2 * b);
  }
  for (const Isa* isa : isas()) {
    // A place of its own, and rows between others' in a larger one.
    const Heads first(c.dtype, c.batch, c.heads, c.length, c.dims, 0, false, 0);
    const Heads again(c.dtype, c.batch, c.heads, c.length, c.dims, 2, true, 1);
    for (const Heads* out : {&first, &again}) {
      EXPECT(moefast_rope(engine(isa->name, out == &first ? 1 : 3), &x.about(), c.rotated,
                          c.traditional, c.freqs ? freqs.data() : nullptr, kBase, scale,
                          offsets.data(), &out->about()) == MOEFAST_OK);
    }
    const std::vector<double> got = first.values();
    double worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double off = std::fabs(got[i] - want[i]) / allowed(c.dtype, want[i]);
      worst = off <= worst ? worst : off;  // NaN counts
    }
    if (!(worst <= 1)) {
      std::printf("  %s, %d of %d dims from position %lld: %.3g of what is allowed\n", isa->name,
                  static_cast<int>(c.rotated), static_cast<int>(c.dims),
                  static_cast<long long>(c.offset), worst);
    }
    EXPECT(worst <= 1);
    EXPECT(again.values() == got);
    EXPECT(again.gaps() == Heads(c.dtype, c.batch, c.heads, c.length, c.dims, 2, true, 1).gaps());
  }
}

void shapes() {
  uint64_t seed = 0;
  for (int64_t dims : {2, 7, 64, 130}) {
    for (int64_t length : {1, 5, 300}) {
      for (int options = 0; options < 4; ++options, ++seed) {
        const int64_t rotated = options & 1 ? dims / 2 * 2 : 2;
        check({1 + static_cast<int64_t>(seed % 2), 3, length, dims, rotated, (options & 2) != 0,
               static_cast<int>(seed % 3), static_cast<int64_t>(37 * seed), seed % 5 == 0},
              seed);
      }
    }
  }
}

void far_positions() {
  for (int64_t offset : {int64_t{1000000}, int64_t{1} << 32, int64_t{-5}}) {
    check({1, 2, 3, 64, 64, false, MOEFAST_FLOAT32, offset, false}, 1);
  }
}

// Angles beyond every integer are no number, and so is what they turn; nothing else happens.
void endless_angles() {
  const float x[4] = {1, 2, 3, 4}, freqs[2] = {1e-30f, INFINITY};
  const moefast_heads heads = {x, MOEFAST_FLOAT32, 1, 1, 1, 4, 4, 4, 4};
  const int64_t offset = 7;
  for (const Isa* isa : isas()) {
    float y[4];
    moefast_heads out = heads;
    out.data = y;
    EXPECT(moefast_rope(engine(isa->name, 1), &heads, 4, 0, freqs, 0, 1, &offset, &out) ==
           MOEFAST_OK);
    EXPECT(std::isnan(y[0]) && std::isnan(y[2]));
    EXPECT(y[1] == 2 && y[3] == 4);  // an endless wave stands still
  }
}

void rules() {
  float x[8] = {};
  int64_t offset = 0;
  const auto refused = [&](int64_t heads, int64_t rotated, float base) {
    const moefast_heads about = {x, MOEFAST_FLOAT32, 1, heads, 1, 8, 8, 8, 8};
    return moefast_rope(engine("", 1), &about, rotated, 0, nullptr, base, 1, &offset, &about) ==
           MOEFAST_BAD_VALUE;
  };
  EXPECT(refused(0, 8, kBase));
  EXPECT(refused(1, 7, kBase));
  EXPECT(refused(1, 0, kBase));
  EXPECT(refused(1, 10, kBase));
  EXPECT(refused(1, 8, 0));
  EXPECT(refused(1, 8, std::numeric_limits<float>::quiet_NaN()));
}

}  // namespace
}  // namespace moefast::testing

int main(int count, char** arguments) {
  using namespace moefast::testing;
  const char* only = count > 1 ? arguments[1] : nullptr;
  run_case("rules", rules, only);
  run_case("shapes", shapes, only);
  run_case("far positions", far_positions, only);
  run_case("endless angles", endless_angles, only);
  return verdict();
}
