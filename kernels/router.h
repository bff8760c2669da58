// What the kernel of kernels/route.metal is told of a router at compile time: a moefast.RouterSpec
// in types.
#ifndef MOEFAST_ROUTER_H
#define MOEFAST_ROUTER_H

#include "score.h"
#include "slots.h"

namespace moefast {
namespace router {

// To another type: half and bfloat do not convert into each other.
template <typename T, typename U>
inline T as(U x) {
  return T(float(x));
}

// The argument for a vector that is not there.
struct Absent {};

// Floats of a RouterSpec.
struct Numbers {
  float softcap;
  float temperature;
  float epsilon;
  float scale;
};

inline Numbers numbers_of(float4 numbers) {
  return {numbers.x, numbers.y, numbers.z, numbers.w};
}

template <bool softcap_, bool temperature_, int score_, bool selected_, bool precise_>
struct Scoring {
  static constexpr constant bool softcap = softcap_;
  static constexpr constant bool temperature = temperature_;
  static constexpr constant int score = score_;
  static constexpr constant bool selected = selected_;  // only the chosen experts are scored
  static constexpr constant bool precise = precise_;
};

template <int count_, int kept_, bool two_, bool zero_>
struct Groups {
  static constexpr constant int count = count_;
  static constexpr constant int kept = kept_;
  static constexpr constant bool drop = kept_ < count_;
  static constexpr constant bool two = two_;    // its score: its two best keys' sum, or its best
  static constexpr constant bool zero = zero_;  // the key of a dropped expert: 0, or -inf
};

template <bool masked_, bool renormalize_, bool epsilon_, bool maximum_, bool scale_>
struct Weighing {
  static constexpr constant bool masked = masked_;  // weights are made of keys
  static constexpr constant bool renormalize = renormalize_;
  static constexpr constant bool epsilon = epsilon_;
  static constexpr constant bool maximum = maximum_;  // of the sum and epsilon, not their sum
  static constexpr constant bool scale = scale_;
};

template <int experts_, int k_, bool highest_, bool biased_, typename S, typename G, typename W>
struct Router {
  static constexpr constant int experts = experts_;
  static constexpr constant int k = k_;
  static constexpr constant bool highest = highest_;  // of equal keys the highest expert is chosen
  static constexpr constant bool biased = biased_;
  using Scoring = S;
  using Groups = G;
  using Weighing = W;

  static constexpr constant bool softmax_of_all = !S::selected && S::score == kSoftmax;
  using Slots = router::Slots<experts_, softmax_of_all ? 4 : 1>;
  // The keys, as they are at the end, are what weights are made of.
  static constexpr constant bool source_is_key = W::masked || !(biased_ || G::drop);
};

// What steps compute in. Source: before the choice (logits or scores); Addend: that, where a bias
// is added to it; Key: their sum; Score: scores of the selected; Sum: the weights and their sum;
// Product: after the expert's factor.
template <typename Source_,
          typename Addend_,
          typename Key_,
          typename Score_,
          typename Sum_,
          typename Product_,
          typename Out_>
struct Types {
  using Source = Source_;
  using Addend = Addend_;
  using Key = Key_;
  using Score = Score_;
  using Sum = Sum_;
  using Product = Product_;
  using Out = Out_;
};

// Words of threadgroup memory, at least one.
template <typename R>
constexpr int scratch_words() {
  return (R::Groups::drop ? R::experts + R::Groups::count : 0) +
         (R::source_is_key ? 0 : R::experts) + 1;
}

}  // namespace router
}  // namespace moefast

#endif
