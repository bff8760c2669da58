#include "recording.h"

#include <algorithm>
#include <cstring>
#include <typeinfo>
#include <utility>

#include "mlx/primitives.h"

namespace moefast::binding {
namespace {

bool is_unscheduled(const mx::array& array) {
  return array.status() == mx::array::Status::unscheduled;
}

class Recorder {
 public:
  Recorder(const Leaves& leaves, size_t constants, mx::Stream stream, int offset)
      : leaves_(leaves), constants_(constants), stream_(stream), offset_(offset) {}

  // Appends what computes `root`. Returns whether that is possible.
  bool add(const mx::array& root) {
    std::vector<std::pair<const mx::array*, size_t>> path;
    path.emplace_back(&root, 0);
    while (!path.empty()) {
      auto& [array, next] = path.back();
      const bool begins = next == 0;
      if (begins && made_.count(array->id()) > 0) {
        path.pop_back();
      } else if (begins && !can_be_part(*array)) {
        return false;
      } else if (next < array->inputs().size()) {
        const auto& input = array->inputs()[next++];
        if (leaves_.count(input.id()) > 0) {
          continue;
        }
        if (is_unscheduled(input)) {
          path.emplace_back(&input, 0);
        } else if (!add_number(input)) {
          return false;
        }
      } else {
        append(*array);
        path.pop_back();
      }
    }
    recording_.script.outputs.push_back(made_.at(root.id()));
    return true;
  }

  Recording take() { return std::move(recording_); }

 private:
  bool can_be_part(const mx::array& array) const {
    if (!is_unscheduled(array) || !array.has_primitive() || array.is_tracer() ||
        array.primitive().stream() != stream_) {
      return false;
    }
    const auto* positional = dynamic_cast<const Positional*>(&array.primitive());
    return positional == nullptr || positional->offset() == offset_;
  }

  bool add_number(const mx::array& number) {
    if (number.size() != 1 || number.is_tracer() || !number.is_available()) {
      return false;
    }
    const Value value{Value::kConstant, constants_ + recording_.numbers.size()};
    if (numbers_.emplace(number.id(), value).second) {
      recording_.numbers.push_back(number);
    }
    return true;
  }

  Value value_of(const mx::array& array) const {
    for (const auto* values : {&leaves_, &numbers_}) {
      if (const auto found = values->find(array.id()); found != values->end()) {
        return found->second;
      }
    }
    return {Value::kMade, made_.at(array.id())};
  }

  void append(const mx::array& array) {
    Part part{array.primitive_ptr()};
    part.runnable = dynamic_cast<Runnable*>(part.primitive.get());
    part.positional = dynamic_cast<Positional*>(part.primitive.get());
    for (const auto& input : array.inputs()) {
      part.inputs.push_back(value_of(input));
    }
    for (const auto& output : array.outputs()) {
      made_.emplace(output.id(), count_++);
      part.shapes.push_back(output.shape());
      part.dtypes.push_back(output.dtype());
    }
    recording_.script.parts.push_back(std::move(part));
  }

  const Leaves& leaves_;
  const size_t constants_;
  const mx::Stream stream_;
  const int offset_;
  Recording recording_;
  Leaves numbers_;
  std::unordered_map<std::uintptr_t, size_t> made_;
  size_t count_ = 0;  // of what has been made
};

bool is_same(const mx::array& a, const mx::array& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::memcmp(a.data<char>(), b.data<char>(), a.itemsize()) == 0;
}

bool is_same(const mx::Primitive& a, const mx::Primitive& b) {
  return typeid(a) == typeid(b) && a.is_equivalent(b);
}

bool is_same(const Part& a, const Part& b) {
  if (a.inputs != b.inputs || a.shapes != b.shapes || a.dtypes != b.dtypes) {
    return false;
  }
  if (a.positional && b.positional) {
    const auto first = a.positional->at(0), second = b.positional->at(0);
    return is_same(dynamic_cast<const mx::Primitive&>(*first),
                   dynamic_cast<const mx::Primitive&>(*second));
  }
  return is_same(*a.primitive, *b.primitive);
}

template <class Item>
bool are_same(const std::vector<Item>& a, const std::vector<Item>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Item& x, const Item& y) { return is_same(x, y); });
}

}  // namespace

std::optional<Recording> record(const std::vector<mx::array>& outputs,
                                const Leaves& leaves,
                                size_t constants,
                                mx::Stream stream,
                                int offset) {
  Recorder recorder(leaves, constants, stream, offset);
  const bool done = std::all_of(outputs.begin(), outputs.end(),
                                [&](const auto& output) { return recorder.add(output); });
  return done ? std::optional(recorder.take()) : std::nullopt;
}

bool is_same(const Recording& a, const Recording& b) {
  return a.script.outputs == b.script.outputs && are_same(a.script.parts, b.script.parts) &&
         are_same(a.numbers, b.numbers);
}

}  // namespace moefast::binding
