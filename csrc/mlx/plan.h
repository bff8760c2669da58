// What is known of an operation before it meets an array: everything a primitive holds.
//
// The inputs of a primitive are a flat list: the operation's own (x, indices, ...) in the order of
// its Plan, then the arrays of its weights, projection by projection: weight, scales, biases, bias,
// global_scale, as far as there are such.
#ifndef MOEFAST_MLX_PLAN_H
#define MOEFAST_MLX_PLAN_H

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "mlx/mlx.h"
#include "moefast.h"

namespace moefast::binding {

namespace mx = mlx::core;

// Dense products of one x, computed together.
constexpr size_t kMostProducts = 8;

enum class Op { kMatmul, kSwitchGlu, kExperts, kRoute, kMoe };

// A projection, and where its arrays stand among the inputs (-1: there is none).
struct Weight {
  moefast_projection form;  // without pointers
  int weight;
  int scales = -1;
  int biases = -1;
  int bias = -1;
  int global_scale = -1;
};

struct Network {
  std::optional<Weight> gate;
  Weight up;
  Weight down;
  moefast_activation activation;
};

struct Plan {
  Op op;
  std::string name;       // of the operation in moefast, for messages
  std::string primitive;  // what MLX prints
  // Inputs before the weights' arrays; -1 where an operation has none such.
  int x = -1;
  int indices = -1;
  int mix = -1;  // routing weights
  int logits = -1;
  int selection_bias = -1;
  int expert_scale = -1;
  std::vector<int32_t> own_dtypes;  // of all of the above, as far as they are there; -1: integers
  int num_inputs = 0;

  moefast_router router{};
  std::vector<Weight> weights;     // of dense products, kMostProducts at most
  std::optional<Network> experts;  // stacks
  std::optional<Network> shared;
  std::optional<Weight> shared_gate;
  int32_t combine_dtype = -1;
  int32_t out_dtype = MOEFAST_FLOAT32;  // of the output; of the weights that a router returns

  // The reference implementation on the same inputs, for derivatives; of a router, the weights of
  // the indices that follow them. Called on any thread.
  std::function<std::vector<mx::array>(const std::vector<mx::array>&)> reference;

  // The shapes of the outputs for inputs that pass check(). Throws std::invalid_argument.
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) const;
  std::vector<mx::Dtype> output_dtypes() const;
  // Every input has the shape and dtype that this plan is for. Throws std::invalid_argument.
  void check(const std::vector<mx::array>& inputs) const;
  bool fits(const std::vector<mx::array>& inputs) const;
};

mx::Dtype mlx_dtype(int32_t dtype);
// enum moefast_dtype, or -1 for any other.
int32_t float_dtype(mx::Dtype dtype);

}  // namespace moefast::binding

#endif
