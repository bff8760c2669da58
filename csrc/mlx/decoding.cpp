#include "decoding.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;

PyObject* name_of(const char* name) {
  return PyUnicode_InternFromString(name);
}

struct Names {
  PyObject* keys = name_of("keys");
  PyObject* values = name_of("values");
  PyObject* offset = name_of("offset");
};

const Names& names() {
  static const auto* const names = new Names;
  return *names;
}

const mx::array* array_in(nb::handle object) {
  return nb::isinstance<mx::array>(object) ? nb::inst_ptr<mx::array>(object) : nullptr;
}

bool is_equal(nb::handle a, nb::handle b) {
  const int answer = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (answer < 0) {
    nb::raise_python_error();
  }
  return answer > 0;
}

mx::Stream stream_here() {
  return mx::default_stream(mx::default_device());
}

// Whether what is scheduled will be there in time for work on `stream`.
bool is_there(const mx::array& array, mx::Stream stream) {
  return array.status() != mx::array::Status::unscheduled &&
         (!array.event().valid() || array.event().stream() == stream || array.is_available());
}

}  // namespace

bool Decoding::record(nb::handle model,
                      const mx::array& inputs,
                      const nb::list& caches,
                      int offset,
                      const nb::list& before,
                      const mx::array& logits,
                      nb::object facts) {
  tree_.walk(model.ptr(), true);
  Leaves leaves;
  Known known;
  const auto add_input = [&](const mx::array& array) {
    const Value value{Value::kInput, known.input_forms.size()};
    known.input_forms.emplace_back(array);
    return leaves.emplace(array.id(), value).second;
  };
  bool distinct = add_input(inputs);
  for (const nb::handle array : before) {
    distinct = distinct && array_in(array) != nullptr && add_input(*array_in(array));
  }
  for (size_t i = 0; i < tree_.arrays.size(); ++i) {
    const auto& array = *tree_.arrays[i];
    const Value value{Value::kConstant, known.constants.size()};
    if (leaves.emplace(array.id(), value).second) {
      known.constants.push_back(i);
      known.constant_forms.emplace_back(array);
    }
  }
  Arrays outputs = {logits};
  for (const nb::handle cache : caches) {
    for (auto* const name : {names().keys, names().values}) {
      const nb::object array = nb::getattr(cache, nb::handle(name));
      if (array_in(array) == nullptr) {
        distinct = false;
      } else {
        outputs.push_back(*array_in(array));
      }
    }
  }
  auto recording =
      distinct ? binding::record(outputs, leaves, known.constants.size(), stream_here(), offset)
               : std::nullopt;
  if (!recording) {
    known_.reset();
    return false;
  }
  known.recording = std::move(*recording);
  known.trace = tree_.trace;
  for (PyObject* const setting : tree_.settings) {
    known.settings.push_back(nb::borrow(setting));
  }
  known.facts = std::move(facts);
  known.cache_type = nb::borrow(nb::handle(caches[0]).type());
  const auto& parts = known.recording.script.parts;
  if (std::any_of(parts.begin(), parts.end(), [](const auto& part) { return !part.runnable; })) {
    known.stream = stream_here();
  }
  const bool certain =
      known_ && known_->cache_type.is(known.cache_type) && known_->trace == known.trace &&
      known_->stream == known.stream && known_->constants == known.constants &&
      is_equal(known_->facts, known.facts) && is_same(known_->recording, known.recording);
  if (certain) {
    known.stage = stage_of(known.recording.script);
  }
  known_ = std::move(known);
  return certain;
}

nb::object Decoding::again(nb::handle model,
                           const mx::array& inputs,
                           nb::handle caches,
                           nb::handle facts) {
  if (!known_ || !known_->stage || mx::default_device() != mx::Device::cpu ||
      (known_->stream && *known_->stream != stream_here()) || !is_equal(known_->facts, facts) ||
      !PyList_CheckExact(caches.ptr()) || known_->input_forms.size() != 1 + 2 * nb::len(caches)) {
    return nb::none();
  }
  auto form = known_->input_forms.begin();
  if (!form->fits(inputs)) {
    return nb::none();
  }
  Arrays taken = {inputs};
  taken.reserve(known_->input_forms.size());
  std::optional<int> offset;
  for (const nb::handle cache : nb::borrow<nb::list>(caches)) {
    if (!cache.type().is(known_->cache_type)) {
      return nb::none();
    }
    int filled = 0;
    if (!nb::try_cast(nb::getattr(cache, nb::handle(names().offset)), filled) || filled < 0 ||
        filled != offset.value_or(filled)) {
      return nb::none();
    }
    offset = filled;
    for (auto* const name : {names().keys, names().values}) {
      const nb::object object = nb::getattr(cache, nb::handle(name));
      const auto* const array = array_in(object);
      if (array == nullptr || !(++form)->fits(*array) || filled >= array->shape(2)) {
        return nb::none();
      }
      taken.push_back(*array);
    }
  }
  tree_.walk(model.ptr(), false);
  const auto stream = stream_here();
  const auto constant = tree_.trace == known_->trace ? constants(stream) : nullptr;
  if (constant == nullptr) {
    return nb::none();
  }
  const auto outputs = in_sequence(stream, known_->stage, constant, std::move(taken), *offset);
  const nb::int_ end(*offset + 1);
  size_t next = 1;
  for (const nb::handle cache : nb::borrow<nb::list>(caches)) {
    nb::setattr(cache, nb::handle(names().keys), nb::cast(outputs[next++]));
    nb::setattr(cache, nb::handle(names().values), nb::cast(outputs[next++]));
    nb::setattr(cache, nb::handle(names().offset), end);
  }
  return nb::cast(outputs[0]);
}

int Decoding::visit_objects(visitproc visit, void* arg) const {
  if (known_) {
    Py_VISIT(known_->facts.ptr());
    Py_VISIT(known_->cache_type.ptr());
    for (const auto& setting : known_->settings) {
      Py_VISIT(setting.ptr());
    }
  }
  return 0;
}

// The tree's arrays and the recording's numbers; null where one is of another form. While a step
// before still runs it holds the same ones, most often.
std::shared_ptr<const Arrays> Decoding::constants(mx::Stream stream) {
  const auto& [which, forms] = std::tie(known_->constants, known_->constant_forms);
  auto last = last_constants_.lock();
  bool same = last != nullptr && last->size() == which.size() + known_->recording.numbers.size();
  for (size_t i = 0; i < which.size(); ++i) {
    const auto& array = *tree_.arrays[which[i]];
    if (same && (*last)[i].id() == array.id()) {
      continue;
    }
    same = false;
    if (!forms[i].fits(array) || !is_there(array, stream)) {
      return nullptr;
    }
  }
  if (same) {
    return last;
  }
  auto all = std::make_shared<Arrays>();
  all->reserve(which.size() + known_->recording.numbers.size());
  for (const size_t i : which) {
    all->push_back(*tree_.arrays[i]);
  }
  all->insert(all->end(), known_->recording.numbers.begin(), known_->recording.numbers.end());
  last_constants_ = all;
  return all;
}

}  // namespace moefast::binding
