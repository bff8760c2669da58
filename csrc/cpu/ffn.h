// Feed-forward networks, each applied to some of the tokens: routed experts and the shared expert
// alike.
#ifndef MOEFAST_CPU_FFN_H
#define MOEFAST_CPU_FFN_H

#include <vector>

#include "engine.h"
#include "linear.h"
#include "operands.h"

namespace moefast {

// What becomes of a row that went through an expert.
struct Routed {
  int32_t token;
  int32_t place;  // row of the output where routes stay apart
  float weight;
};

// One expert and the routes it serves: routes [begin, end) of the list.
struct Expert {
  Linear gate;  // matrix.weight NULL: the activation has none
  Linear up;
  Linear down;
  const moefast_activation* activation;
  int64_t begin;
  int64_t end;
};

struct FeedForward {
  Source x;
  std::vector<Expert> experts;
  std::vector<Routed> routes;
  Precision precision;
  // Output [.., hidden]: the weighted sum of each token's routes, or (apart) every route in its
  // place.
  void* out;
  int out_dtype;
  bool apart = false;
  // Weights [tokens] of x itself in the sum, or NULL.
  const float* identity = nullptr;
};

// Appends the experts that `indices` [tokens, top_k] name, with their routes sorted by expert and,
// within one, by token. Negative indices and those past the stack are left out. `weights` NULL:
// all 1.
void add_routed(const moefast_ffn& stack,
                const int32_t* indices,
                const float* weights,
                int64_t tokens,
                int64_t top_k,
                FeedForward& work);

// Appends an expert of every token; `weights` [tokens], or NULL: all 1.
void add_shared(const moefast_ffn& shared, const float* weights, int64_t tokens, FeedForward& work);

// Runs them: gate, up and activation of every expert, then down and the sum. Sums are taken in the
// order of `experts`, in float32, whatever the number of threads; the result is rounded once.
void run(moefast_engine& engine, const FeedForward& work);

}  // namespace moefast

#endif
