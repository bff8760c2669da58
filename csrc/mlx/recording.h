// What computes some arrays, as a script.
#ifndef MOEFAST_MLX_RECORDING_H
#define MOEFAST_MLX_RECORDING_H

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "mlx/mlx.h"
#include "sequence.h"

namespace moefast::binding {

// What a script begins with, by array::id().
using Leaves = std::unordered_map<std::uintptr_t, Value>;

struct Recording {
  Script script;
  // Numbers that were made for this computation, as a factor is: further constants.
  std::vector<mx::array> numbers;
};

// How `outputs`, which have not been computed, are to be computed on `stream` from `leaves`, of
// which `constants` are constants; nothing where they cannot: they depend on more, or on another
// stream, or MLX traces a transformation, or a position is another than `offset`.
std::optional<Recording> record(const std::vector<mx::array>& outputs,
                                const Leaves& leaves,
                                size_t constants,
                                mx::Stream stream,
                                int offset);

// Whether both compute the same, at their own positions.
bool is_same(const Recording& a, const Recording& b);

}  // namespace moefast::binding

#endif
