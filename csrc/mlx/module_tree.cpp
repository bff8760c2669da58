#include "module_tree.h"

#include <algorithm>
#include <atomic>
#include <iterator>

namespace moefast::binding {
namespace {

// What layers remember of their last call (moefast/nn/recall.py): no settings.
bool is_memory(const PyObject* name) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("_recall"), PyUnicode_InternFromString("_recall_products"),
      PyUnicode_InternFromString("_recall_rows"), PyUnicode_InternFromString("_decoding")};
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

std::uintptr_t number(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address);
}

// Another one as soon as anything of a type, or of what it derives from, is another. Python gives
// none to a type that was changed and not used since, and runs out of them after four billion: such
// a type equals nothing, itself included.
std::uintptr_t version_of(const PyTypeObject* type) {
  static std::atomic<std::uintptr_t> unknown{std::uintptr_t{1} << 32};
  return type->tp_version_tag != 0 ? type->tp_version_tag : ++unknown;
}

}  // namespace

void ModuleTree::walk(PyObject* model, bool with_settings) {
  trace.clear();
  arrays.clear();
  settings.clear();
  with_settings_ = with_settings;
  add(model);
}

// What is or holds modules, or is a setting.
void ModuleTree::add(PyObject* object) {
  static const PyObject* const array_type = nb::type<mx::array>().ptr();
  auto* const type = Py_TYPE(object);
  if (reinterpret_cast<const PyObject*>(type) == array_type) {
    trace.push_back(0);
    arrays.push_back(nb::inst_ptr<mx::array>(object));
  } else if (PyDict_Check(object)) {
    trace.push_back(number(type));
    if (!PyDict_CheckExact(object)) {
      trace.push_back(version_of(type));
      walk_settings(object);
    }
    walk_dictionary(object);
  } else if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    trace.push_back(number(type));
    trace.push_back(static_cast<std::uintptr_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      add(PySequence_Fast_GET_ITEM(object, i));
    }
  } else {
    add_setting(object);
  }
}

void ModuleTree::add_setting(PyObject* object) {
  trace.push_back(number(object));
  if (with_settings_) {
    settings.push_back(object);
  }
}

void ModuleTree::walk_dictionary(PyObject* dictionary) {
  trace.push_back(static_cast<std::uintptr_t>(PyDict_GET_SIZE(dictionary)));
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  while (PyDict_Next(dictionary, &position, &key, &value)) {
    add_setting(key);
    add(value);
  }
}

// The attributes beside the items: numbers, names, descriptions.
void ModuleTree::walk_settings(PyObject* module) {
  PyObject* const attributes = PyObject_GenericGetDict(module, nullptr);
  if (attributes == nullptr) {
    nb::raise_python_error();
  }
  const auto owner = nb::steal(attributes);
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  while (PyDict_Next(attributes, &position, &key, &value)) {
    if (!is_memory(key)) {
      add_setting(key);
      add_setting(value);
    }
  }
}

}  // namespace moefast::binding
