// Fetching weights before they are read.
//
// The hardware's own prefetchers stop at every page of 4 KB and know nothing of the next piece of
// work; asking for what lies 8 KB ahead doubles the bandwidth of one core.
#ifndef MOEFAST_CPU_GENERIC_PREFETCH_H
#define MOEFAST_CPU_GENERIC_PREFETCH_H

#include "../isa.h"

namespace moefast {
namespace {

constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kLineBytes = 64;

// Inlined by force: GCC 12 takes a function that does nothing else for one without effect, and
// drops the calls.
[[gnu::always_inline]] inline void fetch_lines(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    __builtin_prefetch(from + i, 0, 2);  // into the second cache: those that are under way are more
  }
}

// What a call of multiply reads once, rows up to `end`, followed by what the next call will.
class Fetcher {
 public:
  Fetcher(const Matrix& w, int64_t end, const Ahead& ahead)
      : weight_end_(w.weight + end * w.row_bytes),
        ahead_(ahead),
        ahead_bytes_(ahead.weight == nullptr ? 0 : ahead.bytes),
        end_(end),
        rows_(kAheadBytes / w.row_bytes + 1) {}

  // Whoever reads `bytes` of the weight at `at` asks for as much, kAheadBytes further on.
  [[gnu::always_inline]] void weight(const uint8_t* at, int64_t bytes) const {
    const int64_t beyond = kAheadBytes - (weight_end_ - at);
    if (beyond < 0) {
      fetch_lines(at + kAheadBytes, bytes);
    } else if (beyond < ahead_bytes_) {
      fetch_lines(ahead_.weight + beyond, bytes);
    }
  }

  // Where to fetch from while reading what follows `at`; `at` itself where nothing is ahead.
  const uint8_t* later(const uint8_t* at) const {
    const int64_t beyond = kAheadBytes - (weight_end_ - at);
    return beyond < 0 ? at + kAheadBytes : beyond < ahead_bytes_ ? ahead_.weight + beyond : at;
  }

  // Whoever reads scales (and offsets), bytes [from, from + bytes) of row `row`, asks for those of
  // a row about as far on.
  [[gnu::always_inline]] void scales(const Matrix& w,
                                     int64_t row,
                                     int64_t from,
                                     int64_t bytes) const {
    const int64_t beyond = row + rows_ - end_;
    if (beyond < 0) {
      const int64_t at = (row + rows_) * w.scale_bytes + from;
      fetch_lines(w.scales + at, bytes);
      if (w.biases != nullptr) {
        fetch_lines(w.biases + at, bytes);
      }
    } else if (beyond * w.row_bytes < ahead_bytes_) {
      const int64_t at = beyond * w.scale_bytes + from;
      if (ahead_.scales != nullptr) {
        fetch_lines(ahead_.scales + at, bytes);
      }
      if (ahead_.biases != nullptr) {
        fetch_lines(ahead_.biases + at, bytes);
      }
    }
  }

 private:
  const uint8_t* weight_end_;
  Ahead ahead_;
  int64_t ahead_bytes_;
  int64_t end_;
  int64_t rows_;  // that lie between what is read and what is fetched
};

// How far from a row's weights and scales those lie that are to be fetched while it is read.
// 0 where nothing is: asking for a line that is being read anyway costs little.
struct Distance {
  ptrdiff_t weight;
  ptrdiff_t scales;
  ptrdiff_t biases;
};

// Whoever reads two rows at once fetches a page ahead: with more, rows of 704 or 768 bytes come a
// fifth slower (Zen 3; 1024 bytes do not).
constexpr int64_t kAheadOfPairs = 4096;

// Calls visit(from, to, distance) for runs of the rows [begin, end), so that what to fetch is
// settled once for many rows: those some pairs of rows ahead, then what the next call will read.
template <class Visit>
[[gnu::always_inline]] inline void each_distance(
    const Matrix& w, int64_t begin, int64_t end, const Ahead& ahead, Visit visit) {
  const int64_t pairs = kAheadOfPairs / (2 * w.row_bytes);
  const int64_t rows = pairs > 0 ? 2 * pairs : 2;
  const int64_t here = end - begin > rows ? end - rows : begin;
  if (begin < here) {
    const ptrdiff_t scales = rows * w.scale_bytes;
    visit(begin, here, Distance{rows * w.row_bytes, scales, w.biases == nullptr ? 0 : scales});
  }
  const auto distance = [&](const uint8_t* matrix, int64_t stride, const uint8_t* next) {
    return matrix == nullptr || next == nullptr ? ptrdiff_t{0} : next - (matrix + here * stride);
  };
  const int64_t fetched = ahead.weight == nullptr ? 0 : ahead.bytes / w.row_bytes;
  const int64_t last = fetched < end - here ? here + fetched : end;
  if (here < last) {
    visit(here, last,
          Distance{distance(w.weight, w.row_bytes, ahead.weight),
                   distance(w.scales, w.scale_bytes, ahead.scales),
                   distance(w.biases, w.scale_bytes, ahead.biases)});
  }
  if (last < end) {
    visit(last, end, Distance{0, 0, 0});
  }
}

}  // namespace
}  // namespace moefast

#endif
