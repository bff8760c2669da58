// Lookups in a quantized embedding as an MLX primitive.
#ifndef MOEFAST_MLX_EMBED_H
#define MOEFAST_MLX_EMBED_H

#include <optional>
#include <string>

#include "layers.h"
#include "mlx/mlx.h"

namespace moefast::binding {

// Rows of a quantized weight [rows, dims]: indices [...] -> [..., dims], in the dtype of affine
// scales, else bfloat16. Negative indices count from the end; others out of range throw when they
// are evaluated. Throws std::invalid_argument.
mx::array embed(const mx::array& indices,
                const mx::array& weight,
                const mx::array& scales,
                const std::optional<mx::array>& biases,
                const std::optional<mx::array>& global_scale,
                int group_size,
                int bits,
                const std::string& mode);

// The same with the arrays of a layer. None where the call is not of the kind that the first
// arguments stand for: other arrays, type of layer or device, or not low..high indices.
nb::object embed_of(int group_size,
                    int bits,
                    const std::string& mode,
                    bool has_global_scale,
                    const mx::array& indices,
                    nb::handle layer,
                    nb::handle type,
                    size_t low,
                    size_t high);

}  // namespace moefast::binding

#endif
