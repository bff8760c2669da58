#include "layout.h"

#include <algorithm>
#include <cstring>

#include "plan.h"

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;

// Copies blocks of neighbours, row-major.
void copy_blocks(const View& from, char* to) {
  View blocks = from;
  int64_t block = 1;  // elements
  while (!blocks.shape.empty() && (blocks.shape.back() == 1 || blocks.strides.back() == block)) {
    block *= blocks.shape.back();
    blocks.shape.pop_back();
    blocks.strides.pop_back();
  }
  const auto size = static_cast<int64_t>(from.dtype.size());
  each(blocks, 0, 0, [&](int64_t offset) {
    std::memcpy(to, from.data + offset * size, static_cast<size_t>(block * size));
    to += block * size;
  });
}

template <class Element>
void copy_elements(const View& from, char* to) {
  const auto* source = reinterpret_cast<const Element*>(from.data);
  auto* target = reinterpret_cast<Element*>(to);
  each(from, 0, 0, [&](int64_t offset) { *target++ = source[offset]; });
}

bool has_neighbours(const View& view) {
  for (size_t i = view.shape.size(); i-- > 0;) {
    if (view.shape[i] > 1) {
      return view.strides[i] == 1;
    }
  }
  return true;
}

// Whether values within a row are neighbours and rows a constant `stride` apart.
bool evenly_spaced(const mx::array& array, int64_t& stride) {
  const int last = static_cast<int>(array.ndim()) - 1;
  if (array.shape(last) > 1 && array.strides(last) != 1) {
    return false;
  }
  int64_t rows = 1;
  for (int i = last - 1; i >= 0; --i) {  // each step is as long as all the rows within it
    if (array.shape(i) == 1) {
      continue;
    }
    if (rows == 1) {
      stride = array.strides(i);
    } else if (array.strides(i) != stride * rows) {
      return false;
    }
    rows *= array.shape(i);
  }
  return stride >= 0;
}

}  // namespace

View view_of(const mx::array& array) {
  return {array.data<char>(), array.shape(), array.strides(), array.dtype()};
}

const void* Copies::add(const mx::array& array, Arrays& temporaries) {
  mx::array copy(array.shape(), array.dtype(), nullptr, {});
  copy.set_data(mx::allocator::malloc(copy.nbytes()));
  add(array, copy.data<char>());
  temporaries.push_back(copy);
  return copy.data<void>();
}

void Copies::make() const {
  for (const auto& [from, to] : copies_) {
    if (has_neighbours(from)) {
      copy_blocks(from, to);
      continue;
    }
    switch (from.dtype.size()) {
      case 1:
        copy_elements<uint8_t>(from, to);
        break;
      case 2:
        copy_elements<uint16_t>(from, to);
        break;
      default:
        copy_elements<uint32_t>(from, to);
    }
  }
}

moefast_rows rows_of(const mx::array& array, Copies& copies, Arrays& temporaries) {
  const int64_t dims = array.shape(-1);
  moefast_rows rows{nullptr, float_dtype(array.dtype()), static_cast<int64_t>(array.size()) / dims,
                    dims, dims};
  if (evenly_spaced(array, rows.stride)) {
    rows.data = array.data<void>();
  } else {
    rows.data = copies.add(array, temporaries);
    rows.stride = dims;
  }
  return rows;
}

moefast_heads heads_of(const mx::array& array, Copies& copies, Arrays& temporaries) {
  moefast_heads heads{array.data<void>(), float_dtype(array.dtype()),
                      array.shape(0),     array.shape(1),
                      array.shape(2),     array.shape(3),
                      array.strides(0),   array.strides(1),
                      array.strides(2)};
  if (heads.dims > 1 && array.strides(3) != 1) {
    heads.data = copies.add(array, temporaries);
    heads.row_stride = heads.dims;
    heads.head_stride = heads.row_stride * heads.length;
    heads.batch_stride = heads.head_stride * heads.heads;
  }
  return heads;
}

const void* contiguous(const mx::array& array, Copies& copies, Arrays& temporaries) {
  return array.flags().row_contiguous ? array.data<void>() : copies.add(array, temporaries);
}

void give_memory(mx::array& output) {
  if (!output.data_shared_ptr()) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
  }
}

void fill_nan(int32_t dtype, void* out, int64_t count) {
  switch (dtype) {
    case MOEFAST_FLOAT32:
      std::fill_n(static_cast<uint32_t*>(out), count, uint32_t{0x7fc00000});
      break;
    case MOEFAST_FLOAT16:
      std::fill_n(static_cast<uint16_t*>(out), count, uint16_t{0x7e00});
      break;
    default:
      std::fill_n(static_cast<uint16_t*>(out), count, uint16_t{0x7fc0});
  }
}

}  // namespace moefast::binding
