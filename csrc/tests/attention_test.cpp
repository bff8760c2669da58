// Attention on every instruction set of this build and machine, against a loop in float64.
//
// All dtypes; lengths that fill no tile; grouped queries; rows apart from one another, beside pages
// that must not be touched; infinity and NaN; the same bits from any number of threads.
#include <cmath>
#include <string>
#include <vector>

#include "engines.h"
#include "random_heads.h"

namespace moefast::testing {
namespace {

struct Case {
  int64_t batch, length, keys, kv_heads, group, dims, value_dims;
  bool causal;
  int dtype, out_dtype;
};

std::string name_of(const Case& c) {
  std::string text;
  for (int64_t n : {c.batch, c.length, c.keys, c.kv_heads, c.group, c.dims, c.value_dims,
                    int64_t{c.causal}, int64_t{c.dtype}, int64_t{c.out_dtype}}) {
    text += " " + std::to_string(n);
  }
  return text;
}

struct Inputs {
  Inputs(const Case& c, uint64_t seed)
      : q(c.dtype, c.batch, c.kv_heads * c.group, c.length, c.dims, 3, seed % 3 == 0, seed),
        k(c.dtype, c.batch, c.kv_heads, c.keys, c.dims, seed % 2 ? 5 : 0, seed % 3 == 1, seed + 1),
        v(c.dtype, c.batch, c.kv_heads, c.keys, c.value_dims, seed % 2, seed % 3 == 2, seed + 2),
        scale(1.2f / std::sqrt(static_cast<float>(c.dims))) {}
  Heads q, k, v;
  float scale;
};

std::vector<double> expected(const Case& c, const Inputs& in) {
  std::vector<double> out;
  const int64_t heads = c.kv_heads * c.group;
  const std::vector<double> queries = in.q.values(), keys = in.k.values(), values = in.v.values();
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t row = 0; row < c.length; ++row) {
      for (int64_t h = 0; h < heads; ++h) {
        const double* q =
            &queries[static_cast<size_t>(((b * heads + h) * c.length + row) * c.dims)];
        const int64_t first = (b * c.kv_heads + h / c.group) * c.keys;
        const double* k = &keys[static_cast<size_t>(first * c.dims)];
        const double* v = &values[static_cast<size_t>(first * c.value_dims)];
        const int64_t seen = c.causal ? row + 1 + c.keys - c.length : c.keys;
        std::vector<double> weights(static_cast<size_t>(seen));
        double most = -INFINITY, total = 0;
        for (int64_t j = 0; j < seen; ++j) {
          double score = 0;
          for (int64_t i = 0; i < c.dims; ++i) {
            score += q[i] * k[j * c.dims + i];
          }
          weights[static_cast<size_t>(j)] = score * static_cast<double>(in.scale);
          most = std::fmax(most, weights[static_cast<size_t>(j)]);
        }
        for (double& weight : weights) {
          weight = std::exp(weight - most);
          total += weight;
        }
        for (int64_t i = 0; i < c.value_dims; ++i) {
          double sum = 0;
          for (int64_t j = 0; j < seen; ++j) {
            sum += weights[static_cast<size_t>(j)] * v[j * c.value_dims + i];
          }
          out.push_back(sum / total);
        }
      }
    }
  }
  return out;
}

int attend(moefast_engine* on, const Case& c, const Inputs& in, void* out) {
  return moefast_attention(on, &in.q.about(), &in.k.about(), &in.v.about(), in.scale, c.causal, out,
                           c.out_dtype);
}

size_t out_bytes(const Case& c) {
  return static_cast<size_t>(c.batch * c.length * c.kv_heads * c.group * c.value_dims *
                             size_of(c.out_dtype));
}

// What a result may be off by: float32 sums of normal values, and the rounding of the output.
double allowed(int dtype, double value) {
  const double rounding = dtype == MOEFAST_FLOAT32   ? 0
                          : dtype == MOEFAST_FLOAT16 ? 0x1p-11
                                                     : 0x1p-8;
  return 3e-6 + rounding * 1.001 * std::fabs(value);
}

void check(const Case& c, uint64_t seed) {
  const Inputs in(c, seed);
  const std::vector<double> want = expected(c, in);
  for (const Isa* each : isas()) {
    const char* isa = each->name;
    const Guarded first(out_bytes(c));
    EXPECT(attend(engine(isa, 1), c, in, first.data()) == MOEFAST_OK);
    double worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double got = value_of(c.out_dtype, first.data() + i * size_of(c.out_dtype));
      const double off = std::fabs(got - want[i]) / allowed(c.out_dtype, want[i]);
      worst = off <= worst ? worst : off;  // NaN counts
    }
    if (!(worst <= 1)) {
      std::printf("  %s%s: %.3g of what is allowed\n", isa, name_of(c).c_str(), worst);
    }
    EXPECT(worst <= 1);
    if (computes_like_portable(*each)) {
      const Guarded theirs(out_bytes(c));
      EXPECT(attend(engine("portable", 1), c, in, theirs.data()) == MOEFAST_OK);
      EXPECT(std::memcmp(first.data(), theirs.data(), out_bytes(c)) == 0);
    }
    for (int threads : {2, 3}) {
      const Guarded again(out_bytes(c), Guarded::kBegin);
      EXPECT(attend(engine(isa, threads), c, in, again.data()) == MOEFAST_OK);
      EXPECT(std::memcmp(first.data(), again.data(), out_bytes(c)) == 0);
    }
  }
}

void shapes() {
  uint64_t seed = 0;
  for (int64_t length : {1, 3, 17, 130}) {
    for (int64_t keys : {1, 5, 65, 300}) {
      for (int64_t dims : {64, 80, 128}) {
        for (int64_t group : {1, 4, 7}) {
          const bool causal = length <= keys && seed % 4 != 0;
          const int dtype = static_cast<int>(seed % 3);
          const int out_dtype = static_cast<int>(seed / 3 % 3);
          const int64_t batch = length > 100 ? 1 : 1 + static_cast<int64_t>(seed % 2);
          const int64_t kv_heads = 1 + static_cast<int64_t>(seed / 2 % 2);
          check({batch, length, keys, kv_heads, group, dims, dims, causal, dtype, out_dtype}, seed);
          ++seed;
        }
      }
    }
  }
}

void odd_dims() {
  uint64_t seed = 100;
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int64_t dims : {1, 7, 33, 100}) {
      for (int64_t length : {1, 4, 40}) {
        ++seed;
        check({1, length, 70, 2, 3, dims, dims + 5, seed % 2 == 0, dtype, MOEFAST_FLOAT32}, seed);
      }
    }
  }
}

void many_chunks() {
  check({2, 1, 1100, 2, 4, 64, 64, true, MOEFAST_BFLOAT16, MOEFAST_FLOAT32}, 1);
  check({1, 4, 513, 1, 2, 64, 64, true, MOEFAST_FLOAT16, MOEFAST_FLOAT32}, 2);
  check({1, 2, 257, 1, 70, 72, 64, true, MOEFAST_FLOAT32, MOEFAST_FLOAT32}, 3);
  check({1, 16, 259, 2, 1, 64, 64, true, MOEFAST_FLOAT32, MOEFAST_FLOAT32}, 4);
}

// Puts a special value into each of the inputs in turn, at a key in the middle.
void specials() {
  for (int64_t length : {1, 2, 20, 66}) {
    const Case c{1, length, 200, 1, 2, 64, 64, true, MOEFAST_FLOAT32, MOEFAST_FLOAT32};
    for (const double special : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY),
                                 static_cast<double>(NAN), 3e38}) {
      for (int which = 0; which < 3; ++which) {
        for (int64_t key : {int64_t{0}, int64_t{150}, c.keys - 1}) {
          const Inputs in(c, 9);
          const Heads& heads = which == 0 ? in.q : which == 1 ? in.k : in.v;
          put(c.dtype, special, heads.at(0, 0, which == 0 ? key % length : key, 5));
          if (special == 3e38 && which < 2) {
            continue;  // the products overflow where those of float64 do not
          }
          const std::vector<double> want = expected(c, in);
          for (const Isa* isa : isas()) {
            std::vector<float> out(want.size());
            EXPECT(attend(engine(isa->name, 2), c, in, out.data()) == MOEFAST_OK);
            bool same = true;
            for (size_t i = 0; i < want.size(); ++i) {
              const double got = static_cast<double>(out[i]);
              const bool equal = std::isnan(want[i]) ? std::isnan(got)
                                 : std::isinf(want[i])
                                     ? got == want[i]
                                     : std::fabs(got - want[i]) <= 3e-6 + 1e-5 * std::fabs(want[i]);
              same = same && equal;
            }
            if (!same) {
              std::printf("  %s: length %d, %g in %d at %d\n", isa->name, static_cast<int>(length),
                          special, which, static_cast<int>(key));
            }
            EXPECT(same);
          }
        }
      }
    }
  }
}

// Scores of -inf in a first tile or chunk weigh nothing; rows of nothing else are NaN.
void minus_infinity() {
  for (int64_t length : {1, 40}) {
    const Case c{1, length, 600, 1, 1, 64, 64, false, MOEFAST_FLOAT32, MOEFAST_FLOAT32};
    for (int64_t hidden : {300, 600}) {
      const Inputs in(c, 5);
      for (int64_t row = 0; row < length; ++row) {
        put(c.dtype, 1, in.q.at(0, 0, row, 0));
      }
      for (int64_t key = 0; key < hidden; ++key) {
        put(c.dtype, -static_cast<double>(INFINITY), in.k.at(0, 0, key, 0));
      }
      const std::vector<double> want = expected(c, in);
      for (const Isa* isa : isas()) {
        std::vector<float> out(want.size());
        EXPECT(attend(engine(isa->name, 2), c, in, out.data()) == MOEFAST_OK);
        for (size_t i = 0; i < want.size(); ++i) {
          const double got = static_cast<double>(out[i]);
          EXPECT(hidden == c.keys ? std::isnan(got) : std::fabs(got - want[i]) <= 3e-6);
        }
      }
    }
  }
}

void rules() {
  const Case c{1, 3, 5, 2, 2, 8, 8, true, MOEFAST_FLOAT32, MOEFAST_FLOAT32};
  const Inputs in(c, 1);
  float out[3 * 4 * 8];
  const auto refused = [&](auto change, const char* message) {
    moefast_heads q = in.q.about(), k = in.k.about(), v = in.v.about();
    change(q, k, v);
    const int status = moefast_attention(engine("", 1), &q, &k, &v, 1, 1, out, MOEFAST_FLOAT32);
    EXPECT(status == MOEFAST_BAD_VALUE);
    EXPECT(std::strcmp(moefast_error(), message) == 0);
  };
  using H = moefast_heads;
  refused([](H&, H& k, H& v) { k.length = v.length = 0; },
          "[attention] keys.length must be at least 1, got 0.");
  refused([](H& q, H&, H&) { q.heads = 3; },
          "[attention] queries.heads must be a multiple of keys.heads=2, got 3.");
  refused([](H&, H& k, H& v) { k.length = v.length = 2; },
          "[attention] keys.length must be at least queries.length=3 where causal, got 2.");
  refused([](H&, H&, H& v) { v.length = 4; },
          "[attention] values.length must equal keys.length=5, got 4.");
  refused([](H& q, H&, H&) { q.dims = 7; },
          "[attention] keys.dims must equal queries.dims=7, got 8.");
  refused([](H&, H& k, H&) { k.dtype = 3; }, "[attention] keys must be a dtype 0..2, got 3.");
  refused([](H& q, H&, H&) { q.data = nullptr; },
          "[attention] queries must not be NULL, got NULL.");
  moefast_heads none = in.q.about();
  none.length = 0;
  EXPECT(moefast_attention(engine("", 1), &none, &in.k.about(), &in.v.about(), 1, 1, nullptr,
                           MOEFAST_FLOAT32) == MOEFAST_OK);
}

}  // namespace
}  // namespace moefast::testing

int main(int count, char** arguments) {
  using namespace moefast::testing;
  const char* only = count > 1 ? arguments[1] : nullptr;
  run_case("rules", rules, only);
  run_case("shapes", shapes, only);
  run_case("odd dims", odd_dims, only);
  run_case("many chunks", many_chunks, only);
  run_case("specials", specials, only);
  run_case("minus infinity", minus_infinity, only);
  return verdict();
}
