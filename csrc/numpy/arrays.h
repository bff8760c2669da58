// What the kernels take, out of NumPy arrays: every shape, dtype and stride is checked here, so
// that nothing a caller passes can make a kernel read outside an array.
#ifndef MOEFAST_NUMPY_ARRAYS_H
#define MOEFAST_NUMPY_ARRAYS_H

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "spec.h"

namespace moefast::binding {

namespace py = pybind11;

using MaybeArray = std::optional<py::array>;

// "float32 (3, 4)", for messages.
std::string describe(const py::array& array);

// enum moefast_dtype of float32, float16 and (NumPy has no bfloat16) uint16; refuses any other.
int32_t float_dtype(const char* op, const char* name, const py::array& array);

// Refuses an array that is not C-contiguous, aligned and in native byte order.
void check_contiguous(const char* op, const char* name, const py::array& array);
void check_shape(const char* op,
                 const char* name,
                 const py::array& array,
                 const std::vector<py::ssize_t>& shape);

// Floats [..., dims] as rows. Rows may be any constant distance apart; values within one may not.
moefast_rows rows_of(const char* op, const char* name, const py::array& array, int64_t dims);
// Floats [batch, heads, length, dims]; only the values of a row must be neighbours.
moefast_heads heads_of(const char* op, const char* name, const py::array& array);
// Contiguous floats of a shape.
moefast_vector vector_of(const char* op,
                         const char* name,
                         const MaybeArray& array,
                         const std::vector<py::ssize_t>& shape);
// Integers of any dtype, each in 0..num_experts - 1.
std::vector<int32_t> indices_of(const char* op, const py::array& array, int64_t num_experts);

// Of `dtype`; bfloat16 is uint16.
py::array empty(int32_t dtype, const std::vector<py::ssize_t>& shape);

// The shape of an array without its last dimension, and `last` instead of it.
std::vector<py::ssize_t> leading(const py::array& array, std::vector<py::ssize_t> last);

}  // namespace moefast::binding

#endif
