// How the operations are evaluated on a CPU stream: each by itself, or several as one.
#ifndef MOEFAST_MLX_RUNNABLE_H
#define MOEFAST_MLX_RUNNABLE_H

#include <functional>
#include <memory>
#include <vector>

#include "mlx/mlx.h"

namespace moefast::binding {

namespace mx = mlx::core;

// A primitive whose evaluation is work for its stream's thread.
class Runnable {
 public:
  virtual ~Runnable() = default;

  // Gives the outputs memory, as far as they have none, and returns what the stream's thread is to
  // do, or nothing where there is nothing to do. Inputs, outputs and what is appended to
  // `temporaries` are kept until then. `references`: to the description of each input that are
  // those of this evaluation itself; an input with no others may give its memory to an output.
  //
  // Work that fails throws what throw_if_failed() throws, and leaves NaN in the outputs.
  virtual std::function<void()> prepare(const std::vector<mx::array>& inputs,
                                        std::vector<mx::array>& outputs,
                                        std::vector<mx::array>& temporaries,
                                        long references) = 0;
};

// One that depends on how many rows of a cache are filled.
class Positional {
 public:
  virtual ~Positional() = default;
  virtual int offset() const = 0;
  // The same at another offset.
  virtual std::shared_ptr<Runnable> at(int offset) = 0;
};

// Evaluates one by itself, as its eval_cpu().
void evaluate(Runnable& runnable,
              mx::Stream stream,
              const std::vector<mx::array>& inputs,
              std::vector<mx::array>& outputs);

}  // namespace moefast::binding

#endif
