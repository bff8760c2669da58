// Arrays that are read where they lie, and copies of those that no kernel can read so.
//
// Layouts are looked at when MLX evaluates; values may not be there before the stream's thread
// runs.
#ifndef MOEFAST_MLX_LAYOUT_H
#define MOEFAST_MLX_LAYOUT_H

#include <vector>

#include "mlx/mlx.h"
#include "moefast.h"

namespace moefast::binding {

namespace mx = mlx::core;

// An array that is read where it lies, whatever its strides.
struct View {
  const char* data = nullptr;
  mx::Shape shape;
  mx::Strides strides;  // in elements
  mx::Dtype dtype = mx::uint8;
};

View view_of(const mx::array& array);

// Calls visit(offset in elements) for each element, in row-major order.
template <class Visit>
void each(const View& view, size_t dim, int64_t offset, Visit&& visit) {
  if (dim == view.shape.size()) {
    visit(offset);
    return;
  }
  for (int64_t i = 0; i < view.shape[dim]; ++i) {
    each(view, dim + 1, offset + i * view.strides[dim], visit);
  }
}

// Row-major copies, asked for while arguments are laid out and made before the kernel runs.
class Copies {
 public:
  // Where the copy of `array` will be; its memory is appended to `temporaries`.
  const void* add(const mx::array& array, std::vector<mx::array>& temporaries);
  // A copy of `array` at `to`.
  void add(const mx::array& array, char* to) { copies_.push_back({view_of(array), to}); }
  void make() const;

 private:
  struct Copy {
    View from;
    char* to;
  };
  std::vector<Copy> copies_;
};

// Arguments of the C interface that point into an array, or into its copy where values of a row are
// not neighbours, or (rows) rows not evenly spaced.
moefast_rows rows_of(const mx::array& array, Copies& copies, std::vector<mx::array>& temporaries);
moefast_heads heads_of(const mx::array& array, Copies& copies, std::vector<mx::array>& temporaries);
const void* contiguous(const mx::array& array, Copies& copies, std::vector<mx::array>& temporaries);

// Memory for an output that has none.
void give_memory(mx::array& output);

// What an output holds after a failure. MLX takes an array for evaluated once its evaluation was
// tried: whoever reads it in spite of the exception (numpy.asarray does: it asks the array twice)
// must not find plausible numbers.
void fill_nan(int32_t dtype, void* out, int64_t count);

}  // namespace moefast::binding

#endif
