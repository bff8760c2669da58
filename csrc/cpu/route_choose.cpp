#include "route_choose.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "generic/convert.h"
#include "generic/elementwise.h"
#include "route_score.h"

namespace moefast {
namespace {

// Keys as whole numbers in the same order. 0 and -0 are equal.
uint32_t ordinal(float key) {
  const uint32_t bits = bits_of(key + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Descending keys, of equal ones the lowest index first, NaN last: the stable ascending order of
// -key.
struct Lowest {
  static Rank rank(float key, uint32_t index) {
    return Rank{key == key ? ordinal(key) : 0} << 32 | static_cast<uint32_t>(~index);
  }
  static uint32_t index(Rank rank) { return ~static_cast<uint32_t>(rank); }
};

// Descending keys, of equal ones the highest index first, NaN first: the stable ascending order of
// the key, read from its end.
struct Highest {
  static Rank rank(float key, uint32_t index) {
    return Rank{key == key ? ordinal(key) : 0xffffffff} << 32 | index;
  }
  static uint32_t index(Rank rank) { return static_cast<uint32_t>(rank); }
};

// Up to so many are kept sorted while the keys go by; more are sorted afterwards.
constexpr int64_t kFew = 32;

// ranks[0..best) become the best ranks of `count` keys, best first.
template <class Order>
void rank_few(const float* keys, int64_t count, int64_t best, Rank* ranks) {
  std::fill_n(ranks, best, Rank{0});  // below every rank
  for (int64_t i = 0; i < count; ++i) {
    const Rank rank = Order::rank(keys[i], static_cast<uint32_t>(i));
    if (rank <= ranks[best - 1]) {
      continue;
    }
    int64_t at = best - 1;
    for (; at > 0 && ranks[at - 1] < rank; --at) {
      ranks[at] = ranks[at - 1];
    }
    ranks[at] = rank;
  }
}

template <class Order>
void rank_many(const float* keys, int64_t count, int64_t best, Rank* ranks) {
  for (int64_t i = 0; i < count; ++i) {
    ranks[i] = Order::rank(keys[i], static_cast<uint32_t>(i));
  }
  if (best < count) {
    std::nth_element(ranks, ranks + best, ranks + count, std::greater<Rank>());
  }
  std::sort(ranks, ranks + best, std::greater<Rank>());
}

template <class Order>
void rank_best(const float* keys, int64_t count, int64_t best, Rank* ranks) {
  if (best <= kFew) {
    rank_few<Order>(keys, count, best, ranks);
  } else {
    rank_many<Order>(keys, count, best, ranks);
  }
}

// The sum of the two best keys, or the best one; NaN where a key is.
float group_score(const Router& router, const float* keys, int64_t count) {
  float best = -std::numeric_limits<float>::infinity();
  float second = best;
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    second = at_least(second, at_most(keys[i], best));
    best = at_least(best, keys[i]);
    nan |= keys[i] != keys[i];
  }
  float score = router.spec.group_max ? best : best + second;
  round_to(router.key_dtype, &score, 1);
  return nan ? std::numeric_limits<float>::quiet_NaN() : score;
}

}  // namespace

void drop_groups(const Router& router, float* keys, float* scores, Rank* ranks) {
  const moefast_router& spec = router.spec;
  const int64_t groups = spec.num_groups;
  const int64_t size = spec.num_experts / groups;
  for (int64_t g = 0; g < groups; ++g) {
    scores[g] = group_score(router, keys + g * size, size);
  }
  // The first of the ascending order are dropped: of equal groups those of the lowest index.
  rank_best<Highest>(scores, groups, spec.top_groups, ranks);
  const Rank worst_kept = ranks[spec.top_groups - 1];
  const float fill = spec.dropped_minus_inf ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    if (Highest::rank(scores[g], static_cast<uint32_t>(g)) < worst_kept) {
      std::fill_n(keys + g * size, size, fill);
    }
  }
}

void choose_experts(const moefast_router& spec, const float* keys, Rank* ranks, uint32_t* indices) {
  const int64_t best = spec.top_k;
  if (spec.ties_highest) {
    rank_best<Highest>(keys, spec.num_experts, best, ranks);
    for (int64_t i = 0; i < best; ++i) {
      indices[i] = Highest::index(ranks[best - 1 - i]);
    }
  } else {
    rank_best<Lowest>(keys, spec.num_experts, best, ranks);
    for (int64_t i = 0; i < best; ++i) {
      indices[i] = Lowest::index(ranks[i]);
    }
  }
}

}  // namespace moefast
