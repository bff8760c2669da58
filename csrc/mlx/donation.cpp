#include "donation.h"

#include <mutex>
#include <unordered_map>

namespace moefast::binding {
namespace {

// How many Held there are of each memory.
struct Counts {
  std::mutex mutex;
  std::unordered_map<const mx::array::Data*, long> held;
};

Counts& counts() {
  static auto* const counts = new Counts;  // outlives every thread
  return *counts;
}

// MLX tells whether an array is the only one of its description and the only one of its memory, but
// not the first alone. An explicit instantiation may name a private member.
long references(const mx::array& array);

template <auto kDescription>
struct Opened {
  friend long references(const mx::array& array) { return (array.*kDescription).use_count(); }
};
template struct Opened<&mx::array::array_desc_>;

}  // namespace

Held::Held(const mx::array& array) : data_(array.data_shared_ptr().get()) {
  auto& all = counts();
  const std::lock_guard<std::mutex> lock(all.mutex);
  ++all.held[data_];
}

Held::~Held() {
  auto& all = counts();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.held.find(data_);
  if (--found->second == 0) {
    all.held.erase(found);
  }
}

std::vector<std::shared_ptr<const Held>> held_by_mlx(const std::vector<mx::array>& inputs,
                                                     const std::vector<mx::array>& outputs) {
  std::vector<std::shared_ptr<const Held>> held;
  for (const auto& output : outputs) {
    const bool asked_for = &output.inputs() == &inputs;
    if (!asked_for && output.size() > 0) {
      held.push_back(std::make_shared<const Held>(output));
    }
  }
  return held;
}

bool only_held_by_tasks(const mx::array& array, long own) {
  const auto& data = array.data_shared_ptr();
  if (references(array) != own || !data->is_owned()) {
    return false;
  }
  // Both under the lock: each Held that is counted still is one, so that the task which holds the
  // memory after it has not run, and is among the uses.
  auto& all = counts();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.held.find(data.get());
  const long tasks = found == all.held.end() ? 0 : found->second;
  return data.use_count() == 1 + tasks;
}

}  // namespace moefast::binding
