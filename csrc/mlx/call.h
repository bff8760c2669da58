// One evaluation: a plan and its arrays as the arguments of a C function.
#ifndef MOEFAST_MLX_CALL_H
#define MOEFAST_MLX_CALL_H

#include <memory>
#include <vector>

#include "layout.h"
#include "plan.h"

namespace moefast::binding {

// Everything the stream's thread needs. Pointers stay valid until it is done: MLX holds inputs,
// outputs and temporaries for as long.
struct Call {
  std::shared_ptr<const Plan> plan;
  moefast_rows x{};
  moefast_rows logits{};
  View indices;
  int64_t top_k = 0;
  moefast_vector mix{};
  moefast_vector selection_bias{};
  moefast_vector expert_scale{};
  moefast_projection weights[kMostProducts]{};  // in the order of the inputs
  std::vector<void*> outs;                      // of a router, indices and weights
  std::vector<int64_t> out_sizes;               // values
  Copies copies;                                // to be made first
};

// Looks at the inputs' memory, not at values, which may not be there yet. Arrays that lie in a way
// the kernels cannot read get a row-major copy, appended to `temporaries`.
Call make_call(std::shared_ptr<const Plan> plan,
               const std::vector<mx::array>& inputs,
               const std::vector<mx::array>& outputs,
               std::vector<mx::array>& temporaries);

// Does the work, on the stream's thread. Throws std::runtime_error, see failed_with(); floats of
// the output are NaN then.
void run(const Call& call);

// MLX keeps only the text of what is thrown on a stream's thread, and raises it as RuntimeError.
// Whether the text is one of ours, and then the status it stands for.
int failed_with(const char* text);

// Throws what moefast_error() says, as run() does. To be called on a stream's thread.
void throw_if_failed(int status);

// The integers of a view, in row-major order. Throws as throw_if_failed() does where one is not in
// low..high. To be called on a stream's thread.
std::vector<int32_t> read_indices(const std::string& operation,
                                  const View& view,
                                  int64_t low,
                                  int64_t high);

// Before a task of ours does anything, on its stream's thread. MLX counts the tasks under way, and
// mx.eval waits while they are many. Where the exception of an earlier task happens to be raised
// between the counting of a task and its entry into the queue, that one is never counted out: after
// some ten of these, which a hundred exceptions bring, mx.eval would wait for ever. An exception
// loses one task at most: for each of the latest, one is counted out here, as soon as any are
// counted. (Should that have been one under way, MLX lets one more run at a time.)
void mend_task_count(const mx::Stream& stream);

// The process's engine is made at its first use, so that importing starts no threads, and never
// destroyed: at exit, threads of MLX may still be in it.
void configure(int threads, std::string isa);
moefast_engine* engine();

}  // namespace moefast::binding

#endif
