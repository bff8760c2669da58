// Every product of every instruction set of this build and machine, against a loop in float64 and
// against portable.
//
// All formats and precisions; lengths that fill no block; one row, and more than any kernel takes
// at once; parts of a matrix; weights of any alignment, and beside pages that must not be touched.
// Prints a line for each instruction set and format.
#include <algorithm>
#include <cstdio>

#include "isas.h"
#include "rows.h"

namespace moefast::testing {
namespace {

int failures = 0;

template <class... Args>
void fail(const char* message, Args... args) {
  ++failures;
  std::printf("FAILED ");
  std::printf(message, args...);
  std::printf("\n");
}

const char* precision_name(Precision precision) {
  return precision <= kFloat32 ? "float32" : precision == kFloat16 ? "float16" : "bfloat16";
}

struct Case {
  int64_t out;
  int64_t in;
  int64_t count;
  double outliers;  // how often an activation is 60 times as large
};

// What a result may be off by, relative to the root of the sum of the squares of its terms: an
// error that grows with the root of the length; of activations kept to 15 bits of the largest of
// 64, which weighs the more the larger that one is; of two roundings to bfloat16.
double bound(Precision precision, int64_t in, double outliers) {
  const double exact = 4e-7 + 1e-7 * std::sqrt(static_cast<double>(in));
  const double kept = outliers > 0 ? 1e-3 : 1e-4;
  return precision <= kFloat32 ? exact : exact + (precision == kFloat16 ? kept : 4e-3);
}

Rows rows_of(
    const Product& product, const Format& format, int dtype, const Case& c, uint64_t seed) {
  Random random(seed);
  return {product, format, dtype, c.count, c.in, [&](int64_t) {
            const double size = random.uniform() < c.outliers ? 60 : 1;
            return size * random.normal();
          }};
}

struct Largest {
  double error = 0;
  std::string product;
};

void check(const Isa& isa,
           const Format& format,
           Precision precision,
           const Case& c,
           int dtype,
           uint64_t seed,
           Largest& largest) {
  const Product& product =
      *find_product(isa, format, precision, c.in, std::max<int64_t>(c.count, 1));
  const Weight weight(format, c.out, c.in, seed % 2 ? Guarded::kBegin : Guarded::kEnd, seed);
  const Matrix& w = weight.matrix();
  const Rows rows = rows_of(product, format, dtype, c, seed);
  const Product& portable = *find_product(*isa_portable(), format, precision, c.in, c.count);
  const Rows their_rows = rows_of(portable, format, dtype, c, seed);
  const std::string what = std::string(isa.name) + " " + product.name + " " + name_of(format) +
                           " for " + precision_name(precision) + ", out " + std::to_string(c.out) +
                           ", in " + std::to_string(c.in) + ", rows " + std::to_string(c.count);
  if (!rows.usable() || !their_rows.usable()) {
    return fail("%s: cannot prepare", what.c_str());
  }
  Result all(c.count, c.out);
  rows.multiply(w, 0, c.out, 0, c.count, all.data(), all.stride());
  Result theirs(c.count, c.out);
  their_rows.multiply(w, 0, c.out, 0, c.count, theirs.data(), theirs.stride());
  double squares = 0, apart = 0;
  bool equal = true;
  for (int64_t n = 0; n < c.out; ++n) {
    std::vector<double> values;
    for (int64_t i = 0; i < c.in; ++i) {
      values.push_back(weight.value(n, i));
    }
    for (int64_t r = 0; r < c.count; ++r) {
      double sum = 0, size = 1e-300;
      for (int64_t i = 0; i < c.in; ++i) {
        const double term = values[static_cast<size_t>(i)] * rows.value(r, i);
        sum += term;
        size += term * term;
      }
      const double unit = static_cast<double>(w.factor) * std::sqrt(size);
      const double error = (all.at(r, n) - w.factor * sum) / unit;
      const double gap = (all.at(r, n) - static_cast<double>(theirs.at(r, n))) / unit;
      squares += error * error;
      apart += gap * gap;
      equal = equal && all.at(r, n) == theirs.at(r, n);
    }
  }
  const double values = static_cast<double>(std::max<int64_t>(1, c.out * c.count));
  const double rms = std::sqrt(squares / values), gap = std::sqrt(apart / values);
  const double allowed = bound(precision, c.in, c.outliers);
  if (!(rms <= allowed)) {
    fail("%s: error %.3g > %.3g", what.c_str(), rms, allowed);
  }
  if (!(gap <= allowed + bound(kFloat32, c.in, c.outliers))) {
    fail("%s: %.3g from portable", what.c_str(), gap);
  }
  if (computes_like_portable(isa) && product.layout == portable.layout && !equal) {
    fail("%s: not portable's bits", what.c_str());
  }
  largest.error = std::max(largest.error, rms);
  largest.product = product.name;

  // A part of the matrix, and one row of activations alone: not a bit may change.
  const int64_t begin = c.out / 3, end = c.out - c.out / 4;
  Result part(c.count, end - begin);
  rows.multiply(w, begin, end, 0, c.count, part.data(), part.stride());
  bool same = all.tidy() && part.tidy();
  for (int64_t r = 0; r < c.count; ++r) {
    for (int64_t n = begin; n < end; ++n) {
      same = same && part.at(r, n - begin) == all.at(r, n);
    }
  }
  if (product.by_row) {
    for (int64_t r = 0; r < c.count; ++r) {
      Result alone(1, c.out);
      rows.multiply(w, 0, c.out, r, 1, alone.data(), alone.stride());
      for (int64_t n = 0; n < c.out; ++n) {
        same = same && alone.at(0, n) == all.at(r, n);
      }
    }
  }
  if (!same) {
    fail("%s: a result depends on what else is computed", what.c_str());
  }
}

// Infinity, NaN and magnitudes out of range: refused, or (float32) computed.
void check_extremes(const Isa& isa, const Format& format, Precision precision) {
  const int64_t in = 256;
  const Product& product = *find_product(isa, format, precision, in, 1);
  const double inputs[] = {INFINITY, -INFINITY, NAN, 1e-35, 3e30};
  for (double input : inputs) {
    std::vector<float> x(static_cast<size_t>(in), 0.0f);
    x[100] = static_cast<float>(input);
    const void* row = x.data();
    const int64_t bytes = product.prepared_bytes(format, in, 1);
    const Guarded prepared(static_cast<size_t>(bytes));
    const bool usable = product.prepare(format, MOEFAST_FLOAT32, &row, 1, in, prepared.data());
    if (!usable) {
      continue;
    }
    const Weight weight(format, 3, in, Guarded::kEnd, 1);
    const void* rows = prepared.data();
    float y[3];
    product.multiply(weight.matrix(), 0, 3, &rows, 1, y, 3, Ahead{});
    for (int n = 0; n < 3; ++n) {
      const double want = weight.matrix().factor * weight.value(n, 100) * input;
      // Relative to a large weight: a scale's product and its offset may cancel.
      const double size = weight.matrix().factor * std::max(1.0, std::fabs(weight.value(n, 100)));
      const double allowed = bound(precision, 1, 1) * size * std::fabs(input);
      const bool right =
          std::isfinite(want) ? std::fabs(y[n] - want) <= allowed : !std::isfinite(y[n]);
      if (!right) {
        fail("%s %s %s for %s: input %g gives %g, not %g", isa.name, product.name,
             name_of(format).c_str(), precision_name(precision), input, static_cast<double>(y[n]),
             want);
      }
    }
  }
}

std::vector<Case> cases_of(const Format& format) {
  std::vector<Case> cases;
  if (format.mode == MOEFAST_PLAIN) {
    for (int64_t in : {1, 2, 7, 15, 31, 33, 63, 64, 65, 129, 300}) {
      cases.push_back({5, in, 1 + in % 9, 0});
    }
  }
  const int64_t group = format.group == 0 ? 32 : format.group;
  for (int64_t count = 1; count < 10; ++count) {
    cases.push_back({1 + 2 * count, group * (1 + count % 5), count, 0});
  }
  cases.push_back({19, 7 * group, 17, 0});
  cases.push_back({33, 1280, 33, 0.02});
  cases.push_back({5, 2048 + 5 * group, 2, 0});  // more than one panel of scales
  cases.push_back({4, 4096 + group, 1, 0.02});
  return cases;
}

}  // namespace
}  // namespace moefast::testing

int main() {
  using namespace moefast;
  using namespace moefast::testing;
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what was printed last tells where it crashed
  for (const Isa* each : isas()) {
    const Isa& isa = *each;
    for (const Format& format : all_formats()) {
      std::printf("%-8s %-36s", isa.name, testing::name_of(format).c_str());
      for (Precision precision : {kAnyValues, kFloat32, kFloat16, kBfloat16}) {
        Largest largest;
        uint64_t seed = 0;
        for (const Case& c : cases_of(format)) {
          ++seed;
          const int dtype = precision <= kFloat32   ? static_cast<int>(seed % 3)
                            : precision == kFloat16 ? MOEFAST_FLOAT16
                                                    : MOEFAST_BFLOAT16;
          check(isa, format, precision, c, dtype, seed, largest);
        }
        check_extremes(isa, format, precision);
        std::printf("  %s %.2g", largest.product.c_str(), largest.error);
      }
      std::printf("\n");
    }
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
