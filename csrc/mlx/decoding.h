// A model's decoding steps without its Python.
#ifndef MOEFAST_MLX_DECODING_H
#define MOEFAST_MLX_DECODING_H

#include <nanobind/nanobind.h>

#include <optional>
#include <vector>

#include "module_tree.h"
#include "recording.h"

namespace moefast::binding {

// What a model does with one more token. Two steps are recorded as its Python makes them. Where
// they are the same but for their position, the following ones are made from the recording, by one
// operation each, as long as nothing has changed that Python would have looked at: modules, their
// types and settings, shapes and dtypes, `facts`. Arrays are looked up every time; none is held.
class Decoding {
 public:
  // A step, already made in full: `logits` of `inputs`, with `caches` (mlx-lm's KVCache) that were
  // filled up to `offset` and held `before` (keys and values of each), and hold what the step
  // makes. Returns whether steps can be made again now.
  bool record(nb::handle model,
              const mx::array& inputs,
              const nb::list& caches,
              int offset,
              const nb::list& before,
              const mx::array& logits,
              nb::object facts);

  // Makes a step and advances the caches: its logits; or None where that cannot be done.
  nb::object again(nb::handle model, const mx::array& inputs, nb::handle caches, nb::handle facts);

  // For Python's collector of garbage: settings may lead back to the model.
  int visit_objects(visitproc visit, void* arg) const;
  void forget() { known_.reset(); }

 private:
  // An array as it has to be again.
  struct Form {
    mx::Shape shape;
    mx::Dtype dtype;

    explicit Form(const mx::array& array) : shape(array.shape()), dtype(array.dtype()) {}
    bool fits(const mx::array& array) const {
      return array.dtype() == dtype && array.shape() == shape && !array.is_tracer();
    }
  };

  struct Known {
    nb::object cache_type;
    std::vector<std::uintptr_t> trace;
    std::vector<nb::object> settings;  // so that no other comes to stand at their address
    nb::object facts;
    std::optional<mx::Stream> stream;  // that MLX's own operations are on, where there are some
    std::vector<size_t> constants;     // which arrays of the tree
    std::vector<Form> constant_forms;
    std::vector<Form> input_forms;
    Recording recording;
    std::shared_ptr<Stage> stage;  // where it is certain
  };

  std::shared_ptr<const std::vector<mx::array>> constants(mx::Stream stream);

  std::optional<Known> known_;
  ModuleTree tree_;
  std::weak_ptr<const std::vector<mx::array>> last_constants_;
};

}  // namespace moefast::binding

#endif
