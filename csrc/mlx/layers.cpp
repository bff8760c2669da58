#include "layers.h"

namespace moefast::binding {
namespace {

// Interned once; dictionaries find interned keys by address.
struct Keys {
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* scales = PyUnicode_InternFromString("scales");
  PyObject* biases = PyUnicode_InternFromString("biases");
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* global_scale = PyUnicode_InternFromString("global_scale");
  PyObject* gate_proj = PyUnicode_InternFromString("gate_proj");
  PyObject* up_proj = PyUnicode_InternFromString("up_proj");
  PyObject* down_proj = PyUnicode_InternFromString("down_proj");
};

const Keys& keys() {
  static const auto* const keys = new Keys;
  return *keys;
}

// Borrowed, or null.
PyObject* item(nb::handle dictionary, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(dictionary.ptr(), key);
  if (found == nullptr && PyErr_Occurred() != nullptr) {
    nb::raise_python_error();
  }
  return found;
}

// Appends the array under `key`, or finds that there is none where none is expected.
bool append(nb::handle layer, PyObject* key, bool expected, Gathered& inputs) {
  PyObject* const found = item(layer, key);
  const bool there = found != nullptr && found != Py_None;
  if (!there || !expected) {
    return there == expected;
  }
  return inputs.add(found);
}

bool is_layer(nb::handle layer, nb::handle type) {
  return layer && layer.type().ptr() == type.ptr() && PyDict_Check(layer.ptr());
}

}  // namespace

Weights::Weights(std::vector<nb::object> arrays) : arrays_(std::move(arrays)) {
  for (const auto& array : arrays_) {
    nb::cast<const mx::array&>(array);  // TypeError for anything else
  }
}

void Weights::append_to(std::vector<mx::array>& inputs) const {
  for (const auto& array : arrays_) {
    inputs.push_back(*nb::inst_ptr<mx::array>(array));
  }
}

void Gathered::reserve(size_t size) {
  arrays.reserve(size);
  objects.reserve(size);
}

bool Gathered::add(nb::handle object) {
  static const PyObject* const array_type = nb::type<mx::array>().ptr();
  const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(object.ptr()));
  if (type != array_type && !nb::isinstance<mx::array>(object)) {
    return false;
  }
  arrays.push_back(*nb::inst_ptr<mx::array>(object));
  objects.push_back(object);
  return true;
}

bool append_layer(nb::handle layer, nb::handle type, const Weight& weight, Gathered& inputs) {
  if (!is_layer(layer, type)) {
    return false;
  }
  const auto& key = keys();
  return append(layer, key.weight, true, inputs) &&
         append(layer, key.scales, weight.scales >= 0, inputs) &&
         append(layer, key.biases, weight.biases >= 0, inputs) &&
         append(layer, key.bias, weight.bias >= 0, inputs) &&
         append(layer, key.global_scale, weight.global_scale >= 0, inputs);
}

bool append_network(nb::handle layers,
                    const nb::tuple& types,
                    size_t first_type,
                    const Network& network,
                    Gathered& inputs) {
  const auto& key = keys();
  const auto type = [&](size_t i) { return types[first_type + i]; };
  return network.gate && types.size() >= first_type + 4 && is_layer(layers, type(0)) &&
         append_layer(item(layers, key.gate_proj), type(1), *network.gate, inputs) &&
         append_layer(item(layers, key.up_proj), type(2), network.up, inputs) &&
         append_layer(item(layers, key.down_proj), type(3), network.down, inputs);
}

bool append_block(nb::handle experts,
                  nb::handle shared,
                  nb::handle shared_gate,
                  const nb::tuple& types,
                  const Plan& plan,
                  Gathered& inputs) {
  return append_network(experts, types, 0, *plan.experts, inputs) &&
         (!plan.shared || append_network(shared, types, 4, *plan.shared, inputs)) &&
         (!plan.shared_gate ||
          append_layer(shared_gate, types[types.size() - 1], *plan.shared_gate, inputs));
}

}  // namespace moefast::binding
