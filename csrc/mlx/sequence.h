// Several operations as one.
//
// To MLX every operation is an array that is described, visited, queued and let go, by two threads
// that share their cores with the kernels: tens of microseconds of a processor's time while weights
// stream through the caches. A token of a model is a hundred operations, most of which take less.
#ifndef MOEFAST_MLX_SEQUENCE_H
#define MOEFAST_MLX_SEQUENCE_H

#include <memory>
#include <vector>

#include "mlx/mlx.h"
#include "runnable.h"

namespace moefast::binding {

// What a part reads: a constant, an input of the sequence, or what a part before it has made.
struct Value {
  enum Kind { kConstant, kInput, kMade } kind;
  size_t index;

  bool operator==(const Value&) const = default;
};

// An operation of ours (`runnable`, `positional` where it is that too), or of MLX's own.
struct Part {
  std::shared_ptr<mx::Primitive> primitive;
  Runnable* runnable;
  Positional* positional;
  std::vector<Value> inputs;
  std::vector<mx::Shape> shapes;  // of what it makes
  std::vector<mx::Dtype> dtypes;
};

struct Script {
  std::vector<Part> parts;
  std::vector<size_t> outputs;  // which of what the parts make, counted through
};

// A script, with what its evaluations have in common: memory for what only parts of ours read, and
// the work of those that find the same in the same places every time.
class Stage;

std::shared_ptr<Stage> stage_of(Script script);

// One operation out of the parts of a script: its outputs on `inputs`, on `stream`, the one that
// MLX's own parts are for. Parts that depend on a position get `offset`. It has no derivative.
std::vector<mx::array> in_sequence(mx::Stream stream,
                                   std::shared_ptr<Stage> stage,
                                   std::shared_ptr<const std::vector<mx::array>> constants,
                                   std::vector<mx::array> inputs,
                                   int offset);

}  // namespace moefast::binding

#endif
