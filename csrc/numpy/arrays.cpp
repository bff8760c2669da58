#include "arrays.h"

#include <cstdint>
#include <limits>

namespace moefast::binding {

namespace {

bool is(const py::array& array, char kind, py::ssize_t size) {
  return array.dtype().kind() == kind && array.itemsize() == size &&
         array.dtype().byteorder() != '>';
}

bool aligned(const py::array& array) {
  return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

std::string text(const std::vector<py::ssize_t>& shape) {
  return py::str(py::tuple(py::cast(shape)));
}

std::vector<py::ssize_t> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

}  // namespace

std::string describe(const py::array& array) {
  return std::string(py::str(array.dtype())) + " " + text(shape_of(array));
}

int32_t float_dtype(const char* op, const char* name, const py::array& array) {
  if (is(array, 'f', 4)) {
    return MOEFAST_FLOAT32;
  }
  if (is(array, 'f', 2)) {
    return MOEFAST_FLOAT16;
  }
  if (is(array, 'u', 2)) {
    return MOEFAST_BFLOAT16;
  }
  refuse(op, std::string(name) + " must be float32, float16 or (bfloat16 as) uint16",
         py::str(array.dtype()));
}

void check_contiguous(const char* op, const char* name, const py::array& array) {
  if ((array.flags() & py::array::c_style) == 0 || !aligned(array)) {
    refuse(op, std::string(name) + " must be contiguous and aligned", describe(array));
  }
}

void check_shape(const char* op,
                 const char* name,
                 const py::array& array,
                 const std::vector<py::ssize_t>& shape) {
  if (shape_of(array) != shape) {
    refuse(op, std::string(name) + " must have shape " + text(shape), describe(array));
  }
}

moefast_rows rows_of(const char* op, const char* name, const py::array& array, int64_t dims) {
  const int32_t dtype = float_dtype(op, name, array);
  const py::ssize_t last = array.ndim() - 1;
  if (last < 0 || array.shape(last) != dims) {
    refuse(op, std::string(name) + ".shape[-1] must equal " + std::to_string(dims),
           text(shape_of(array)));
  }
  const py::ssize_t size = array.itemsize();
  int64_t count = 1, stride = dims * size;
  bool even = dims == 1 || array.strides(last) == size;
  // From the innermost dimension outwards: each step must be as long as all the rows within it.
  for (py::ssize_t i = last; i-- > 0;) {
    if (array.shape(i) == 1) {
      continue;
    }
    if (count == 1) {
      stride = array.strides(i);
    } else if (array.strides(i) != stride * count) {
      even = false;
    }
    count *= array.shape(i);
  }
  if (count > 0 && (!even || stride % size != 0 || !aligned(array))) {
    refuse(op, std::string(name) + " must have contiguous rows, evenly spaced and aligned",
           describe(array));
  }
  return {array.data(), dtype, count, dims, stride / size};
}

moefast_heads heads_of(const char* op, const char* name, const py::array& array) {
  const int32_t dtype = float_dtype(op, name, array);
  if (array.ndim() != 4) {
    refuse(op, std::string(name) + " must be [batch, heads, length, dims]", describe(array));
  }
  const py::ssize_t size = array.itemsize();
  bool even = (array.shape(3) <= 1 || array.strides(3) == size) && aligned(array);
  for (int i = 0; i < 3; ++i) {
    even = even && array.strides(i) % size == 0;
  }
  if (array.size() > 0 && !even) {
    refuse(op, std::string(name) + " must have contiguous rows, and be aligned", describe(array));
  }
  return {array.data(),           dtype,          array.shape(0),          array.shape(1),
          array.shape(2),         array.shape(3), array.strides(0) / size, array.strides(1) / size,
          array.strides(2) / size};
}

moefast_vector vector_of(const char* op,
                         const char* name,
                         const MaybeArray& array,
                         const std::vector<py::ssize_t>& shape) {
  if (!array) {
    return {nullptr, MOEFAST_FLOAT32};
  }
  check_shape(op, name, *array, shape);
  const int32_t dtype = float_dtype(op, name, *array);
  check_contiguous(op, name, *array);
  return {array->data(), dtype};
}

std::vector<int32_t> indices_of(const char* op, const py::array& array, int64_t num_experts) {
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') {
    refuse(op, "indices must be integers", py::str(array.dtype()));
  }
  // In 64 bits of their own sign nothing wraps.
  const py::array wide = kind == 'i' ? py::array(py::array_t<int64_t>::ensure(array))
                                     : py::array(py::array_t<uint64_t>::ensure(array));
  // A copy where it is needed: of integers as they come only those of 64 bits are not one by now.
  const auto flat =
      py::array::ensure(wide, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_);
  const auto* from = static_cast<const uint64_t*>(flat.data());
  std::vector<int32_t> indices(static_cast<size_t>(flat.size()));
  for (size_t i = 0; i < indices.size(); ++i) {
    if (from[i] >= static_cast<uint64_t>(num_experts)) {  // negative ones are huge
      refuse(op, "indices must be in 0.." + std::to_string(num_experts - 1),
             kind == 'i' ? std::to_string(static_cast<int64_t>(from[i])) : std::to_string(from[i]));
    }
    indices[i] = static_cast<int32_t>(from[i]);
  }
  return indices;
}

py::array empty(int32_t dtype, const std::vector<py::ssize_t>& shape) {
  switch (dtype) {
    case MOEFAST_FLOAT32:
      return py::array(py::dtype::of<float>(), shape);
    case MOEFAST_FLOAT16:
      return py::array(py::dtype("float16"), shape);
    default:
      return py::array(py::dtype::of<uint16_t>(), shape);
  }
}

std::vector<py::ssize_t> leading(const py::array& array, std::vector<py::ssize_t> last) {
  auto shape = shape_of(array);
  if (!shape.empty()) {
    shape.pop_back();
  }
  shape.insert(shape.end(), last.begin(), last.end());
  return shape;
}

}  // namespace moefast::binding
