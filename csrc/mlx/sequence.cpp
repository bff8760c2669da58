#include "sequence.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include "call.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;
using Work = std::function<void()>;
using Memory = std::shared_ptr<mx::array::Data>;

// What an evaluation has in store for the stream's thread: work of its own, and of all evaluations.
struct Works {
  std::vector<const Work*> order;
  std::list<Work> own;

  void add(Work work) {
    if (work) {
      own.push_back(std::move(work));
      order.push_back(&own.back());
    }
  }

  // All of it, one after another. After an exception the rest runs on NaN, as operations by
  // themselves do, and the first one is thrown.
  void run() const {
    std::exception_ptr first;
    for (const auto* work : order) {
      try {
        (*work)();
      } catch (...) {
        if (!first) {
          first = std::current_exception();
        }
      }
    }
    if (first) {
      std::rethrow_exception(first);
    }
  }
};

// What stays in place from one evaluation to the next, on one stream with the same constants.
struct Prepared {
  mx::Stream stream;
  std::weak_ptr<const Arrays> constants;
  std::vector<std::optional<mx::array>> made;
  std::vector<Work> works;  // of fixed parts
  Arrays temporaries;
};

}  // namespace

class Stage {
 public:
  explicit Stage(Script script) : script(std::move(script)) {
    std::vector<mx::Shape> all_shapes;
    std::vector<mx::Dtype> all_dtypes;
    for (const Part& part : this->script.parts) {
      all_shapes.insert(all_shapes.end(), part.shapes.begin(), part.shapes.end());
      all_dtypes.insert(all_dtypes.end(), part.dtypes.begin(), part.dtypes.end());
    }
    for (const size_t output : this->script.outputs) {
      shapes.push_back(all_shapes[output]);
      dtypes.push_back(all_dtypes[output]);
    }
    // MLX's own parts may let their outputs share memory with their inputs.
    stays.assign(all_shapes.size(), true);
    for (const size_t output : this->script.outputs) {
      stays[output] = false;
    }
    size_t first = 0;
    for (const Part& part : this->script.parts) {
      for (size_t i = 0; part.runnable == nullptr && i < part.shapes.size(); ++i) {
        stays[first + i] = false;
      }
      for (const Value& value : part.inputs) {
        if (part.runnable == nullptr && value.kind == Value::kMade) {
          stays[value.index] = false;
        }
      }
      first += part.shapes.size();
    }
    first = 0;
    for (const Part& part : this->script.parts) {
      bool is_fixed = part.runnable != nullptr && part.positional == nullptr;
      for (const Value& value : part.inputs) {
        is_fixed = is_fixed && (value.kind == Value::kConstant ||
                                (value.kind == Value::kMade && stays[value.index]));
      }
      for (size_t i = 0; i < part.shapes.size(); ++i) {
        is_fixed = is_fixed && stays[first + i];
      }
      fixed.push_back(is_fixed);
      first += part.shapes.size();
    }
  }

  // Those of the last evaluation, if they are of the same kind.
  std::shared_ptr<const Prepared> prepared(mx::Stream stream,
                                           const std::shared_ptr<const Arrays>& constants) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool fit =
        prepared_ && prepared_->stream == stream && prepared_->constants.lock() == constants;
    return fit ? prepared_ : nullptr;
  }

  void keep(std::shared_ptr<const Prepared> prepared) {
    const std::lock_guard<std::mutex> lock(mutex_);
    prepared_ = std::move(prepared);
  }

  const Script script;
  std::vector<mx::Shape> shapes;  // of the outputs
  std::vector<mx::Dtype> dtypes;
  std::vector<bool> stays;  // of what the parts make: it is in the same memory every time
  std::vector<bool> fixed;  // of the parts: they do the same every time

 private:
  std::mutex mutex_;
  std::shared_ptr<const Prepared> prepared_;
};

namespace {

class Sequence : public mx::Primitive {
 public:
  Sequence(mx::Stream stream,
           std::shared_ptr<Stage> stage,
           std::shared_ptr<const Arrays> constants,
           int offset)
      : mx::Primitive(stream),
        stage_(std::move(stage)),
        constants_(std::move(constants)),
        offset_(offset) {}

  const char* name() const override { return "MoefastSequence"; }

  void eval_gpu(const Arrays&, Arrays&) override {
    refuse("sequence", "backend 'native' must run on a CPU stream", "a GPU stream");
  }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    // Each output of several holds the inputs, too, and would let them go only afterwards.
    for (auto& output : outputs) {
      if (&output.inputs() != &inputs && !output.is_tracer()) {
        output.inputs().clear();
      }
    }
    Evaluation(*this, inputs).run(outputs);
  }

 private:
  class Evaluation {
   public:
    Evaluation(Sequence& sequence, const Arrays& inputs)
        : sequence_(sequence),
          stage_(*sequence.stage_),
          inputs_(inputs),
          encoder_(mx::cpu::get_command_encoder(sequence.stream())),
          made_(stage_.stays.size()),
          prepared_(stage_.prepared(sequence.stream(), sequence.constants_)) {
      if (prepared_ == nullptr) {
        fresh_ = std::make_shared<Prepared>(Prepared{sequence.stream(), sequence.constants_});
        fresh_->made.resize(stage_.stays.size());
        fresh_->works.resize(stage_.fixed.size());
        prepared_ = fresh_;
      }
    }

    void run(Arrays& outputs) {
      size_t first = 0;
      for (size_t i = 0; i < stage_.script.parts.size(); ++i) {
        const Part& part = stage_.script.parts[i];
        if (fresh_ || !stage_.fixed[i]) {
          prepare(i, first);
        } else if (prepared_->works[i]) {
          works_->order.push_back(&prepared_->works[i]);
        }
        first += part.shapes.size();
      }
      for (size_t i = 0; i < outputs.size(); ++i) {
        outputs[i].copy_shared_buffer(*made_[stage_.script.outputs[i]]);
      }
      encoder_.add_temporaries(std::move(temporaries_));
      dispatch(prepared_, memory_of(outputs), sequence_.constants_, held_by_mlx(inputs_, outputs));
      if (fresh_) {
        stage_.keep(fresh_);
      }
    }

   private:
    // A part whose outputs are counted from `first`.
    void prepare(size_t which, size_t first) {
      const Part& part = stage_.script.parts[which];
      Arrays taken, given;
      for (const Value& value : part.inputs) {
        taken.push_back(at(value));
      }
      for (size_t i = 0; i < part.shapes.size(); ++i) {
        const bool there = stage_.stays[first + i] && !fresh_;
        given.push_back(there ? *prepared_->made[first + i]
                              : mx::array(part.shapes[i], part.dtypes[i], nullptr, Arrays{}));
      }
      if (part.runnable == nullptr) {
        dispatch();
        part.primitive->eval_cpu(taken, given);
      } else {
        const auto moved = part.positional ? part.positional->at(sequence_.offset_) : nullptr;
        auto& runnable = moved ? *moved : *part.runnable;
        const bool stays = fresh_ && stage_.fixed[which];
        // One reference from where the value stands, one from `taken`.
        auto work = runnable.prepare(taken, given, stays ? fresh_->temporaries : temporaries_, 2);
        if (stays && work) {
          fresh_->works[which] = std::move(work);
          works_->order.push_back(&fresh_->works[which]);
        } else {
          works_->add(std::move(work));
        }
      }
      for (size_t i = 0; i < given.size(); ++i) {
        if (!stage_.stays[first + i]) {
          made_[first + i] = std::move(given[i]);
        } else if (fresh_) {
          fresh_->made[first + i] = std::move(given[i]);
        }
      }
    }

    const mx::array& at(const Value& value) const {
      switch (value.kind) {
        case Value::kConstant:
          return (*sequence_.constants_)[value.index];
        case Value::kInput:
          return inputs_[value.index];
        default:
          return stage_.stays[value.index] ? *prepared_->made[value.index] : *made_[value.index];
      }
    }

    // Hands over what is to be done so far, and what is to be kept until then.
    template <class... Kept>
    void dispatch(Kept... kept) {
      if (works_->order.empty() && sizeof...(kept) == 0) {
        return;
      }
      encoder_.dispatch([works = std::exchange(works_, std::make_shared<Works>()),
                         on = sequence_.stream(), ... kept = std::move(kept)] {
        mend_task_count(on);
        works->run();
      });
    }

    // What this evaluation alone has made. Not the outputs': MLX keeps them, and whoever counts the
    // holders of an output counts on nobody else.
    std::vector<Memory> memory_of(const Arrays& outputs) const {
      std::vector<Memory> kept;
      for (const auto& array : made_) {
        const auto memory = array ? array->data_shared_ptr() : nullptr;
        const auto is_same = [&](const auto& output) { return output.data_shared_ptr() == memory; };
        if (memory && std::none_of(outputs.begin(), outputs.end(), is_same)) {
          kept.push_back(memory);
        }
      }
      return kept;
    }

    Sequence& sequence_;
    Stage& stage_;
    const Arrays& inputs_;
    mx::cpu::CommandEncoder& encoder_;
    std::vector<std::optional<mx::array>> made_;  // what does not stay
    std::shared_ptr<const Prepared> prepared_;
    std::shared_ptr<Prepared> fresh_;  // the same, where they are made now
    std::shared_ptr<Works> works_ = std::make_shared<Works>();
    Arrays temporaries_;
  };

  std::shared_ptr<Stage> stage_;
  std::shared_ptr<const Arrays> constants_;
  int offset_;
};

}  // namespace

std::shared_ptr<Stage> stage_of(Script script) {
  return std::make_shared<Stage>(std::move(script));
}

std::vector<mx::array> in_sequence(mx::Stream stream,
                                   std::shared_ptr<Stage> stage,
                                   std::shared_ptr<const Arrays> constants,
                                   Arrays inputs,
                                   int offset) {
  auto shapes = stage->shapes;
  const auto dtypes = stage->dtypes;
  auto primitive =
      std::make_shared<Sequence>(stream, std::move(stage), std::move(constants), offset);
  return mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs);
}

}  // namespace moefast::binding
