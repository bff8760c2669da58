// A model as Python has it: modules in modules, with arrays, settings and types.
#ifndef MOEFAST_MLX_MODULE_TREE_H
#define MOEFAST_MLX_MODULE_TREE_H

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "mlx/mlx.h"

namespace moefast::binding {

namespace nb = nanobind;
namespace mx = mlx::core;

// What is found on a walk through mlx.nn.Modules, lists, tuples and dictionaries.
//
// Everything but the arrays goes into a trace: types (with what Python changes when anything of a
// type is changed), names, and settings, which count by identity. Two walks with equal traces have
// come through models that differ in their arrays at most, as long as the settings of the first
// live.
struct ModuleTree {
  std::vector<std::uintptr_t> trace;
  std::vector<const mx::array*> arrays;  // those that Python holds
  std::vector<PyObject*> settings;       // borrowed

  // Begins anew at `model`; without settings if they are of no use.
  void walk(PyObject* model, bool with_settings);

 private:
  void add(PyObject* object);
  void add_setting(PyObject* object);
  void walk_dictionary(PyObject* dictionary);
  void walk_settings(PyObject* module);

  bool with_settings_ = true;
};

}  // namespace moefast::binding

#endif
