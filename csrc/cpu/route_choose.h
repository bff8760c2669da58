// The steps of routing that choose: which groups stay, and which experts.
#ifndef MOEFAST_CPU_ROUTE_CHOOSE_H
#define MOEFAST_CPU_ROUTE_CHOOSE_H

#include "route.h"

namespace moefast {

// A key and its index as one number: the larger wins, and no two are equal.
using Rank = uint64_t;

// The keys of all groups but the best top_groups become 0 or -infinity. `scores` and `ranks`:
// memory for num_groups each.
void drop_groups(const Router& router, float* keys, float* scores, Rank* ranks);

// The best top_k experts, in the order of route_row(). `ranks`: memory for num_experts.
void choose_experts(const moefast_router& spec, const float* keys, Rank* ranks, uint32_t* indices);

}  // namespace moefast

#endif
