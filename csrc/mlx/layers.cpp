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

// Appends the array under `key`, or finds that there is none where none is expected.
bool append(nb::handle layer, PyObject* key, bool expected, std::vector<mx::array>& inputs) {
  PyObject* const found = PyDict_GetItem(layer.ptr(), key);  // borrowed
  const bool there = found != nullptr && found != Py_None;
  if (!there || !expected) {
    return there == expected;
  }
  const nb::handle array(found);
  if (!nb::isinstance<mx::array>(array)) {
    return false;
  }
  inputs.push_back(*nb::inst_ptr<mx::array>(array));
  return true;
}

nb::handle child(nb::handle layers, PyObject* key) {
  return PyDict_Check(layers.ptr()) ? PyDict_GetItem(layers.ptr(), key) : nullptr;
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

bool append_layer(nb::handle layer,
                  nb::handle type,
                  const Weight& weight,
                  std::vector<mx::array>& inputs) {
  if (!layer || !PyDict_Check(layer.ptr()) || layer.type().ptr() != type.ptr()) {
    return false;
  }
  const auto& key = keys();
  return append(layer, key.weight, true, inputs) &&
         append(layer, key.scales, weight.scales >= 0, inputs) &&
         append(layer, key.biases, weight.biases >= 0, inputs) &&
         append(layer, key.bias, weight.bias >= 0, inputs) &&
         append(layer, key.global_scale, weight.global_scale >= 0, inputs);
}

bool append_layers(nb::handle layers,
                   const nb::tuple& types,
                   size_t first_type,
                   const Network& network,
                   std::vector<mx::array>& inputs) {
  const auto& key = keys();
  if (types.size() < first_type + 3) {
    return false;
  }
  return network.gate &&
         append_layer(child(layers, key.gate_proj), types[first_type], *network.gate, inputs) &&
         append_layer(child(layers, key.up_proj), types[first_type + 1], network.up, inputs) &&
         append_layer(child(layers, key.down_proj), types[first_type + 2], network.down, inputs);
}

}  // namespace moefast::binding
