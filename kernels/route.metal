// Router logits to the experts of each token and their weights, in one launch: scores, selection
// bias, groups, the best k, and what makes weights of their scores.
//
//   logits          [tokens, experts]  float, half or bfloat
//   selection_bias  [experts] or Absent, any of the three
//   expert_scale    [experts] or Absent, any of the three
//   indices         [tokens, k]        uint32
//   weights         [tokens, k]        Types::Out
//
// Up to 1024 experts and k of 32. What a step computes in is given by Types; Router says which
// steps there are, and Numbers has their floats.
//
// A simdgroup has a token, a lane every 32nd expert (or every 32nd four: Slots); lane r < k writes
// choice r. Threadgroups are whole simdgroups, one or several. No threadgroup barrier: the
// simdgroups do not know of each other. Beside its registers a simdgroup has
// scratch_words<Router>() of threadgroup memory: where groups are dropped all keys and a word for
// each group; the scores, where they are not the keys.
//
// Device memory: logits once, the bias once for each token, k words of the scale, and the outputs.
//
// The reference is moefast/backends/reference/route.py on MLX's Metal backend: its order of
// experts, ties and NaN included, and the bits of the weights (of one token or many; MLX adds up a
// single vector differently).
#include "router.h"
#include "score.h"
#include "select.h"

namespace moefast {
namespace router {

template <typename Types, typename Source>
inline typename Types::Key biased(Source source, Absent, int) {
  return as<typename Types::Key>(source);
}

template <typename Types, typename Source, typename Bias>
inline typename Types::Key biased(Source source, Bias bias, int expert) {
  using Key = typename Types::Key;
  return Key(as<Key>(as<typename Types::Addend>(source)) + as<Key>(bias[expert]));
}

template <typename Product, typename Sum>
inline Product scaled(Sum weight, Absent, int) {
  return as<Product>(weight);
}

template <typename Product, typename Sum, typename Scale>
inline Product scaled(Sum weight, Scale scale, int expert) {
  return Product(as<Product>(weight) * as<Product>(scale[expert]));
}

template <typename S, typename T>
inline T transformed(T x, Numbers numbers) {
  if constexpr (S::softcap) {
    T cap = T(numbers.softcap);
    x = T(tanh_of(T(x / cap)) * cap);
  }
  return S::temperature ? T(x / T(numbers.temperature)) : x;
}

// What a lane's logits are before the choice: transformed logits, or scores.
template <typename R, typename Source, typename Logits>
inline void read(thread Source (&source)[R::Slots::count],
                 Logits logits,
                 Numbers numbers,
                 int lane) {
  using S = typename R::Scoring;
#pragma clang loop unroll(full)
  for (int slot = 0; slot < R::Slots::count; slot++) {
    int expert = R::Slots::expert(slot, lane);
    Source x =
        expert < R::experts ? transformed<S>(as<Source>(logits[expert]), numbers) : Source(0);
    source[slot] = S::selected || S::score == kSoftmax ? x : score_of_one<S::score>(x);
  }
  if constexpr (R::softmax_of_all) {
    using Acc = conditional_t<S::precise, float, Source>;
    softmax_of_slots<Acc, typename R::Slots>(source, lane);
  }
}

// Keys of dropped groups become the fill.
template <typename R, typename Key>
inline void mask(thread Key (&keys)[R::Slots::count], threadgroup uint* scratch, int lane) {
  using G = typename R::Groups;
  threadgroup uint* dropped = scratch + R::experts;
#pragma clang loop unroll(full)
  for (int slot = 0; slot < R::Slots::count; slot++) {
    int expert = R::Slots::expert(slot, lane);
    if (expert < R::experts) {
      scratch[expert] = ordered(keys[slot]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  drop_groups<Key, R::experts, G::count, G::kept, G::two>(scratch, dropped, lane);
#pragma clang loop unroll(full)
  for (int slot = 0; slot < R::Slots::count; slot++) {
    int expert = R::Slots::expert(slot, lane);
    if (expert < R::experts && dropped[expert / (R::experts / G::count)]) {
      keys[slot] = Key(G::zero ? 0.0f : -INFINITY);
    }
  }
}

// The weights of the chosen experts, choice r in lane r.
template <typename R, typename Types, typename Scale, typename Source>
inline typename Types::Out weigh(
    Source source, Scale scale, Numbers numbers, int expert, int lane) {
  using S = typename R::Scoring;
  using W = typename R::Weighing;
  using Sum = typename Types::Sum;
  using Product = typename Types::Product;
  Sum weight = as<Sum>(source);
  if constexpr (S::selected) {
    using Score = typename Types::Score;
    Score x = as<Score>(source);
    using Acc = conditional_t<S::precise, float, Score>;
    weight = Sum(S::score == kSoftmax ? softmax_of_lanes<Acc, R::k>(x, lane)
                                      : score_of_one<S::score>(x));
  }
  if constexpr (W::renormalize) {
    Sum total = Sum(0);
#pragma clang loop unroll(full)
    for (int choice = 0; choice < R::k; choice++) {
      total = Sum(shuffled(weight, choice) + total);
    }
    if constexpr (W::epsilon) {
      Sum epsilon = Sum(numbers.epsilon);
      Sum larger = isnan(float(total)) || total > epsilon ? total : epsilon;
      total = W::maximum ? larger : Sum(total + epsilon);
    }
    weight = Sum(weight / total);
  }
  Product product = lane < R::k ? scaled<Product>(weight, scale, expert) : Product(0);
  return as<typename Types::Out>(W::scale ? Product(product * Product(numbers.scale)) : product);
}

// One token, by one simdgroup. logits, indices and weights are the token's own, scratch the
// simdgroup's.
template <typename R, typename Types, typename Logits, typename Bias, typename Scale>
inline void route(Logits logits,
                  Bias bias,
                  Scale scale,
                  device uint* indices,
                  device typename Types::Out* weights,
                  threadgroup uint* scratch,
                  Numbers numbers,
                  int lane) {
  using Slots = typename R::Slots;
  using Source = typename Types::Source;
  using Key = typename Types::Key;
  using Rank = router::Rank<Key, R::highest>;
  Source source[Slots::count];
  read<R>(source, logits, numbers, lane);
  Key keys[Slots::count];
#pragma clang loop unroll(full)
  for (int slot = 0; slot < Slots::count; slot++) {
    int expert = Slots::expert(slot, lane);
    keys[slot] = expert < R::experts ? biased<Types>(source[slot], bias, expert) : Key(0);
  }
  if constexpr (R::Groups::drop) {
    mask<R>(keys, scratch, lane);
  }
  threadgroup uint* sources = scratch + (R::Groups::drop ? R::experts + R::Groups::count : 0);
  uint ranks[Slots::count];
#pragma clang loop unroll(full)
  for (int slot = 0; slot < Slots::count; slot++) {
    int expert = Slots::expert(slot, lane);
    ranks[slot] = expert < R::experts ? Rank::of(keys[slot], expert) : 0u;
    if (!R::source_is_key && expert < R::experts) {
      sources[expert] = as_type<uint>(float(source[slot]));
    }
  }
  int chosen = 0;
  uint rank = 0;
  for (int choice = 0; choice < R::k; choice++) {
    int expert;
    uint best = Rank::template best<Slots>(ranks, lane, expert);
    bool mine = lane == (R::highest ? R::k - 1 - choice : choice);
    chosen = mine ? expert : chosen;
    rank = mine ? best : rank;
#pragma clang loop unroll(full)
    for (int slot = 0; slot < Slots::count; slot++) {
      ranks[slot] = Slots::expert(slot, lane) == expert ? 0u : ranks[slot];
    }
  }
  typename Types::Out weight;
  if constexpr (R::source_is_key) {
    weight = weigh<R, Types>(Rank::key(rank), scale, numbers, chosen, lane);
  } else {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    Source own = Source(as_type<float>(sources[chosen]));
    weight = weigh<R, Types>(own, scale, numbers, chosen, lane);
  }
  if (lane < R::k) {
    indices[lane] = uint(chosen);
    weights[lane] = weight;
  }
}

}  // namespace router
}  // namespace moefast

#ifndef MOEFAST_JIT

using namespace moefast::router;

// For each token one threadgroup of one simdgroup.
template <typename R, typename Types, typename T>
[[kernel]] void route_unbiased(const device T* logits [[buffer(0)]],
                               device uint* indices [[buffer(1)]],
                               device typename Types::Out* weights [[buffer(2)]],
                               constant float4& numbers [[buffer(3)]],
                               uint token [[threadgroup_position_in_grid]],
                               uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint scratch[scratch_words<R>()];
  route<R, Types>(logits + size_t(token) * R::experts, Absent{}, Absent{}, indices + token * R::k,
                  weights + token * R::k, scratch, numbers_of(numbers), lane);
}

template <typename R, typename Types, typename T>
[[kernel]] void route_biased(const device T* logits [[buffer(0)]],
                             const device float* selection_bias [[buffer(1)]],
                             device uint* indices [[buffer(2)]],
                             device typename Types::Out* weights [[buffer(3)]],
                             constant float4& numbers [[buffer(4)]],
                             uint token [[threadgroup_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint scratch[scratch_words<R>()];
  route<R, Types>(logits + size_t(token) * R::experts, selection_bias, Absent{},
                  indices + token * R::k, weights + token * R::k, scratch, numbers_of(numbers),
                  lane);
}

// Of GraniteMoE 3B, Qwen1.5-MoE and DeepSeek-V3.
// clang-format off
using Selected = Scoring<false, false, kSoftmax, true, true>;
using Softmax = Scoring<false, false, kSoftmax, false, true>;
using Sigmoid = Scoring<false, false, kSigmoid, false, true>;
using Ungrouped = Groups<1, 1, true, true>;
using Unchanged = Weighing<false, false, false, false, false>;
using Granite = Router<40, 8, true, false, Selected, Ungrouped, Unchanged>;
using Qwen2 = Router<60, 4, false, false, Softmax, Ungrouped, Unchanged>;
using V3 = Router<256, 8, false, true, Sigmoid, Groups<8, 4, true, true>, Weighing<false, true, false, false, true>>;
using GraniteTypes = Types<bfloat, bfloat, bfloat, float, float, float, float>;
using Qwen2Types = Types<half, half, half, half, half, half, half>;
using V3Types = Types<float, float, float, float, float, float, float>;

template [[host_name("route_e40_k8_granitemoe_bfloat")]] [[kernel]]
decltype(route_unbiased<Granite, GraniteTypes, bfloat>) route_unbiased<Granite, GraniteTypes, bfloat>;
template [[host_name("route_e60_k4_qwen2_moe_half")]] [[kernel]]
decltype(route_unbiased<Qwen2, Qwen2Types, half>) route_unbiased<Qwen2, Qwen2Types, half>;
template [[host_name("route_e256_k8_deepseek_v3_bfloat")]] [[kernel]]
decltype(route_biased<V3, V3Types, bfloat>) route_biased<V3, V3Types, bfloat>;
// clang-format on

#endif
