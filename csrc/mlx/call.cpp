#include "call.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

#include "mlx/scheduler.h"
#include "spec.h"

namespace moefast::binding {
namespace {

struct Settings {
  std::mutex mutex;
  int threads = 0;
  std::string isa;
  moefast_engine* engine = nullptr;
};

Settings& settings() {
  static auto* const settings = new Settings;  // outlives every thread
  return *settings;
}

// What was thrown last on streams' threads, oldest first.
struct Failures {
  std::mutex mutex;
  std::deque<std::pair<std::string, int>> recent;
};

Failures& failures() {
  static auto* const failures = new Failures;
  return *failures;
}

// Exceptions that may have lost a task each, see mend_task_count().
std::atomic<int>& exceptions() {
  static std::atomic<int> count{0};
  return count;
}

[[noreturn]] void fail(int status, const std::string& text) {
  constexpr size_t kRemembered = 64;
  constexpr int kLatest = 2;  // earlier ones have been raised by now, and mended if they had to be
  if (exceptions() < kLatest) {
    ++exceptions();
  }
  {
    auto& known = failures();
    const std::lock_guard<std::mutex> lock(known.mutex);
    known.recent.emplace_back(text, status);
    if (known.recent.size() > kRemembered) {
      known.recent.pop_front();
    }
  }
  throw std::runtime_error(text);
}

template <class Integer>
std::vector<int32_t> read_as(const std::string& operation,
                             const View& view,
                             int64_t low,
                             int64_t high) {
  const auto* from = reinterpret_cast<const Integer*>(view.data);
  std::vector<int32_t> indices;
  each(view, 0, 0, [&](int64_t offset) {
    const Integer index = from[offset];
    if (std::cmp_less(index, low) || std::cmp_greater(index, high)) {
      fail(MOEFAST_BAD_VALUE, "[" + operation + "] indices must be in " + std::to_string(low) +
                                  ".." + std::to_string(high) + ", got " + std::to_string(index) +
                                  ".");
    }
    indices.push_back(static_cast<int32_t>(index));
  });
  return indices;
}

class Builder {
 public:
  Builder(const std::vector<mx::array>& inputs, std::vector<mx::array>& temporaries, Call& call)
      : inputs_(inputs), temporaries_(temporaries), call_(call) {}

  moefast_rows rows(int index) {
    return index < 0 ? moefast_rows{} : rows_of(inputs_[index], call_.copies, temporaries_);
  }

  moefast_vector vector(int index) {
    if (index < 0) {
      return {nullptr, MOEFAST_FLOAT32};
    }
    return {memory(index), float_dtype(inputs_[index].dtype())};
  }

  moefast_projection projection(const Weight& weight) {
    moefast_projection p = weight.form;
    p.weight = memory(weight.weight);
    p.scales = memory(weight.scales);
    p.biases = memory(weight.biases);
    p.bias = memory(weight.bias);
    p.global_scale = static_cast<const float*>(memory(weight.global_scale));
    return p;
  }

 private:
  const void* memory(int index) {
    return index < 0 ? nullptr : contiguous(inputs_[index], call_.copies, temporaries_);
  }

  const std::vector<mx::array>& inputs_;
  std::vector<mx::array>& temporaries_;
  Call& call_;
};

// The networks of a call: descriptors pointing at the call's weights.
struct Networks {
  explicit Networks(const Call& call) : next(call.weights) {
    const Plan& plan = *call.plan;
    weights = next;
    next += plan.weights.size();
    if (plan.experts) {
      experts = take(*plan.experts);
    }
    if (plan.shared) {
      shared = take(*plan.shared);
    }
    if (plan.shared_gate) {
      shared_gate = next++;
    }
  }

  moefast_ffn take(const Network& network) {
    moefast_ffn ffn{};
    ffn.gate = network.gate ? next++ : nullptr;
    ffn.up = next++;
    ffn.down = next++;
    ffn.activation = network.activation;
    return ffn;
  }

  const moefast_projection* next;
  const moefast_projection* weights = nullptr;
  const moefast_projection* shared_gate = nullptr;
  moefast_ffn experts{};
  moefast_ffn shared{};
};

int dispatch(const Call& call) {
  const Plan& plan = *call.plan;
  const Networks networks(call);
  std::vector<int32_t> indices;
  if (plan.indices >= 0) {
    indices = read_indices(plan.name, call.indices, 0, plan.experts->up.form.num_experts - 1);
  }
  auto* const on = engine();
  switch (plan.op) {
    case Op::kMatmul:
      return moefast_matmul(on, &call.x, networks.weights, call.outs.data(),
                            static_cast<int64_t>(call.outs.size()), plan.out_dtype);
    case Op::kSwitchGlu:
      return moefast_switch_glu(on, &call.x, &networks.experts, indices.data(), call.top_k,
                                call.outs[0], plan.out_dtype);
    case Op::kExperts:
      return moefast_experts(on, &call.x, &networks.experts, indices.data(), &call.mix, call.top_k,
                             call.outs[0], plan.out_dtype);
    case Op::kRoute:
      return moefast_route(on, &call.logits, &plan.router, &call.selection_bias, &call.expert_scale,
                           static_cast<uint32_t*>(call.outs[0]), call.outs[1], plan.out_dtype);
    default:
      return moefast_moe(on, &call.x, &call.logits, &plan.router, &call.selection_bias,
                         &call.expert_scale, &networks.experts,
                         plan.shared ? &networks.shared : nullptr, networks.shared_gate,
                         plan.combine_dtype, call.outs[0], plan.out_dtype);
  }
}

void void_output(const Call& call) {
  for (size_t i = 0; i < call.outs.size(); ++i) {
    if (call.plan->op == Op::kRoute && i == 0) {
      std::memset(call.outs[i], 0, static_cast<size_t>(call.out_sizes[i]) * sizeof(uint32_t));
    } else {
      fill_nan(call.plan->out_dtype, call.outs[i], call.out_sizes[i]);
    }
  }
}

}  // namespace

Call make_call(std::shared_ptr<const Plan> plan,
               const std::vector<mx::array>& inputs,
               const std::vector<mx::array>& outputs,
               std::vector<mx::array>& temporaries) {
  Call call;
  Builder builder(inputs, temporaries, call);
  call.x = builder.rows(plan->x);
  call.logits = builder.rows(plan->logits);
  if (plan->indices >= 0) {
    call.indices = view_of(inputs[plan->indices]);
    call.top_k = inputs[plan->indices].shape(-1);
  }
  call.mix = builder.vector(plan->mix);
  call.selection_bias = builder.vector(plan->selection_bias);
  call.expert_scale = builder.vector(plan->expert_scale);
  auto* next = call.weights;
  const auto add = [&](const std::optional<Weight>& weight) {
    if (weight) {
      *next++ = builder.projection(*weight);
    }
  };
  for (const Weight& weight : plan->weights) {
    *next++ = builder.projection(weight);
  }
  for (const auto* network : {&plan->experts, &plan->shared}) {
    if (*network) {
      add((*network)->gate);
      add((*network)->up);
      add((*network)->down);
    }
  }
  add(plan->shared_gate);
  for (const auto& output : outputs) {
    call.outs.push_back(const_cast<char*>(output.data<char>()));
    call.out_sizes.push_back(static_cast<int64_t>(output.size()));
  }
  call.plan = std::move(plan);
  return call;
}

void run(const Call& call) {
  try {
    call.copies.make();
    throw_if_failed(dispatch(call));
  } catch (...) {
    void_output(call);
    throw;
  }
}

void mend_task_count(const mx::Stream& stream) {
  int left = exceptions();
  while (left > 0 && mx::scheduler::n_active_tasks() > 0) {
    if (exceptions().compare_exchange_weak(left, left - 1)) {
      --left;
      mx::scheduler::notify_task_completion(stream);
    }
  }
}

void throw_if_failed(int status) {
  if (status != MOEFAST_OK) {
    fail(status, moefast_error());
  }
}

// In the width they come in: a cast could wrap around into the range.
std::vector<int32_t> read_indices(const std::string& operation,
                                  const View& view,
                                  int64_t low,
                                  int64_t high) {
  switch (view.dtype.val()) {
    case mx::Dtype::Val::uint8:
      return read_as<uint8_t>(operation, view, low, high);
    case mx::Dtype::Val::int8:
      return read_as<int8_t>(operation, view, low, high);
    case mx::Dtype::Val::uint16:
      return read_as<uint16_t>(operation, view, low, high);
    case mx::Dtype::Val::int16:
      return read_as<int16_t>(operation, view, low, high);
    case mx::Dtype::Val::uint32:
      return read_as<uint32_t>(operation, view, low, high);
    case mx::Dtype::Val::int32:
      return read_as<int32_t>(operation, view, low, high);
    case mx::Dtype::Val::uint64:
      return read_as<uint64_t>(operation, view, low, high);
    default:
      return read_as<int64_t>(operation, view, low, high);
  }
}

int failed_with(const char* text) {
  auto& known = failures();
  const std::lock_guard<std::mutex> lock(known.mutex);
  for (const auto& [message, status] : known.recent) {
    if (message == text) {
      return status;
    }
  }
  return MOEFAST_OK;
}

void configure(int threads, std::string isa) {
  auto& s = settings();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.engine != nullptr && (threads != s.threads || isa != s.isa)) {
    refuse("engine", "threads and isa must be set before the first use", "an engine in use");
  }
  s.threads = threads;
  s.isa = std::move(isa);
}

moefast_engine* engine() {
  auto& s = settings();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.engine == nullptr) {
    const int status = moefast_engine_create(s.threads, s.isa.c_str(), &s.engine);
    if (status != MOEFAST_OK) {
      fail(status, moefast_error());
    }
  }
  return s.engine;
}

}  // namespace moefast::binding
