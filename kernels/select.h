// The choice of a token's experts by their keys, by one simdgroup: the order of MLX's sort without
// a sort.
//
// That sort is stable and ascending; NaN comes last, 0 and -0 are equal. Keys become ranks,
// unsigned numbers of which 0 is none and the largest is chosen next. A rank of a 16-bit key has
// the expert in its other half, so that one reduction finds both.
#ifndef MOEFAST_SELECT_H
#define MOEFAST_SELECT_H

#include "slots.h"

namespace moefast {
namespace router {

// Unsigned numbers in the order of floats, never 0; NaN is the largest.
template <typename T>
struct Ordered {
  using Bits = ushort;
  static constexpr constant ushort sign = 0x8000u;
  static constexpr constant ushort nan = 0xffffu;
};

template <>
struct Ordered<float> {
  using Bits = uint;
  static constexpr constant uint sign = 0x80000000u;
  static constexpr constant uint nan = 0xffffffffu;
};

template <typename T>
inline uint ordered(T x) {
  using O = Ordered<T>;
  using Bits = typename O::Bits;
  Bits bits = as_type<Bits>(x);
  Bits order = Bits(bits & O::sign ? ~bits : bits | O::sign);
  order = float(x) == 0.0f ? O::sign : order;
  return isnan(float(x)) ? O::nan : order;
}

// The number again; -0 has become 0. Of NaN's order, and of what is no number's, NaN.
template <typename T>
inline T number_of(uint order) {
  using O = Ordered<T>;
  using Bits = typename O::Bits;
  return as_type<T>(Bits(order & O::sign ? order & ~O::sign : ~order));
}

// highest: of equal keys the one of the highest expert is chosen first, and NaN before all numbers;
// otherwise that of the lowest, and NaN after all numbers.
template <typename Key, bool highest, bool wide = sizeof(Key) == 4>
struct Rank {
  static uint of(Key key, int expert) {
    uint order = !highest && isnan(float(key)) ? 1u : ordered(key);
    return wide ? order : order << 16 | uint(highest ? expert : 0xffff - expert);
  }

  static Key key(uint rank) { return number_of<Key>(wide ? rank : rank >> 16); }

  // The largest rank of the simdgroup, and the expert it belongs to.
  template <typename Slots>
  static uint best(const thread uint (&ranks)[Slots::count], int lane, thread int& expert) {
    uint mine = 0;
    int where = 0;
#pragma clang loop unroll(full)
    for (int slot = 0; slot < Slots::count; slot++) {
      bool better = highest ? ranks[slot] >= mine : ranks[slot] > mine;
      mine = better ? ranks[slot] : mine;
      where = better ? Slots::expert(slot, lane) : where;
    }
    uint top = simd_max(mine);
    if constexpr (wide) {
      int candidate = mine == top ? where : highest ? 0 : Slots::experts;
      expert = highest ? simd_max(candidate) : simd_min(candidate);
    } else {
      expert = highest ? int(top & 0xffffu) : 0xffff - int(top & 0xffffu);
    }
    return top;
  }
};

// The two largest orders of a group, 0 where there is none.
struct BestTwo {
  uint first;
  uint second;

  void add(uint order) thread {
    second = max(second, min(first, order));
    first = max(first, order);
  }

  void add_lanes(ushort apart, bool both) thread {
    uint other = simd_shuffle_xor(first, apart);
    uint next = both ? simd_shuffle_xor(second, apart) : 0u;
    second = max(max(second, next), min(first, other));
    first = max(first, other);
  }
};

// Which groups of experts a token keeps.
//   keys: an ordered() key for each expert; scores: one place for each group.
//   Afterwards scores has 1 for each group that is dropped, and 0 for the others.
// A group's score is its largest key, or the sum of its two largest, of type Key; the groups of
// lowest score are dropped, NaN being the largest and the lowest group going first. Lanes share a
// group as far as there are lanes.
template <typename Key, int experts, int groups, int kept, bool two>
inline void drop_groups(const threadgroup uint* keys, threadgroup uint* scores, int lane) {
  constexpr int kSize = experts / groups;
  constexpr int kShare = groups > 16 ? 1 : groups > 8 ? 2 : groups > 4 ? 4 : groups > 2 ? 8 : 16;
  constexpr int kAtOnce = kLanes / kShare;
  constexpr int kRounds = (groups + kAtOnce - 1) / kAtOnce;
  for (int round = 0; round < kRounds; round++) {
    int group = round * kAtOnce + lane / kShare;
    BestTwo best = {0, 0};
    if (group < groups) {
      for (int i = lane % kShare; i < kSize; i += kShare) {
        best.add(keys[group * kSize + i]);
      }
    }
    for (int apart = kShare / 2; apart > 0; apart /= 2) {
      best.add_lanes(ushort(apart), two);
    }
    if (group < groups && lane % kShare == 0) {
      Key sum = Key(number_of<Key>(best.second) + number_of<Key>(best.first));
      scores[group] = two ? ordered(sum) : best.first;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  constexpr int kOwn = (groups + kLanes - 1) / kLanes;
  uint dropped[kOwn];
  for (int i = 0; i < kOwn; i++) {
    int group = i * kLanes + lane;
    int below = 0;
    if (group < groups) {
      for (int other = 0; other < groups; other++) {
        bool first = scores[other] < scores[group];
        below += first || (scores[other] == scores[group] && other < group);
      }
    }
    dropped[i] = below < groups - kept;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < kOwn; i++) {
    int group = i * kLanes + lane;
    if (group < groups) {
      scores[group] = dropped[i];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

}  // namespace router
}  // namespace moefast

#endif
