// Whether an operation may write into the memory of an input.
//
// MLX's own answer, array::is_donatable(), is no while anything else holds the memory, and one of
// those is MLX itself: after an operation's task it puts another into the stream's queue, which
// keeps the memory of inputs and of all outputs but one until it has run. Where steps are built
// while earlier ones still run (mlx-lm generates that way), the cache that a step gets is held by
// the task of the step before. That task is no reason to copy the cache, since the stream runs it
// first. So these tasks are counted, and as many holders are overlooked.
#ifndef MOEFAST_MLX_DONATION_H
#define MOEFAST_MLX_DONATION_H

#include <memory>
#include <vector>

#include "mlx/mlx.h"

namespace moefast::binding {

namespace mx = mlx::core;

// A task that is about to be dispatched, after which MLX will hold `array`'s memory once, in
// another task of the same stream. To be owned by the first task, and so gone before the second
// lets go.
class Held {
 public:
  explicit Held(const mx::array& array);
  ~Held();
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  const mx::array::Data* data_;
};

// One of each output that MLX keeps so once an evaluation of `inputs` is dispatched: all of several
// outputs, but for the one that it asked for.
std::vector<std::shared_ptr<const Held>> held_by_mlx(const std::vector<mx::array>& inputs,
                                                     const std::vector<mx::array>& outputs);

// Whether nobody but the evaluation that asks will know the memory of `array`, one of its inputs,
// by the time a task dispatched now runs: neither another reference to the array, beside the
// `own` references of the evaluation, nor an array that shares its memory.
bool only_held_by_tasks(const mx::array& array, long own);

}  // namespace moefast::binding

#endif
