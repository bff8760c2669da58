// How the experts of a token are shared out among the lanes of its simdgroup.
#ifndef MOEFAST_SLOTS_H
#define MOEFAST_SLOTS_H

#include "common.h"

namespace moefast {
namespace router {

// Lane l has `width` experts in a row, every 32 * width experts: MLX's softmax has four.
template <int experts_, int width_>
struct Slots {
  static constexpr constant int experts = experts_;
  static constexpr constant int width = width_;
  static constexpr constant int blocks = (experts + kLanes * width - 1) / (kLanes * width);
  static constexpr constant int count = blocks * width;

  // Grows with the slot; from `experts` on there is none.
  static int expert(int slot, int lane) {
    return (slot / width * kLanes + lane) * width + slot % width;
  }
};

}  // namespace router
}  // namespace moefast

#endif
