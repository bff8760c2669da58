// Routes sorted by expert, and the tiles of the grouped products: a counting sort, in one launch or
// two. Equal to a stable sort in every place.
//
// indices: [routes] uint32, the expert of each; those of EXPERTS and above do not exist, come last.
//
// order: [routes] uint32, the routes by expert; those of one expert in their own order.
//
// offsets: [EXPERTS + 2] uint32: expert e has order[offsets[e]] to order[offsets[e + 1] - 1];
// EXPERTS stands for all that do not exist, the last offset is `routes`.
//
// tiles: [routes / HEIGHT + min(EXPERTS + 1, routes), 3] uint32: expert, first place in order,
// rows. Tiles of up to HEIGHT rows that never straddle experts, in order; then those that are not
// needed, all 0.
//
// counts (of two launches only): [groups, EXPERTS + 1] uint32, how many of a threadgroup's routes
// each expert has.
//
// Launch: threadgroups of SIMDGROUPS simdgroups, 8 to 32; one, or equally many in both of two
// launches. A simdgroup owns a run of consecutive routes and takes 32 at a time: a ballot for each
// bit of the expert tells a lane which lanes share it. No atomics: a count has one writer.
//
// Memory: indices read twice where they are placed, once where counted; order, offsets and tiles
// written once; counts read once by each threadgroup. Threadgroup: SIMDGROUPS (EXPERTS + 1) uint16
// and 2 (EXPERTS + 2) + SIMDGROUPS uint32: 25 KB for 1024 experts.
#include "plan.h"

#ifndef MOEFAST_JIT

template <int EXPERTS, int SIMDGROUPS, int HEIGHT>
[[kernel]] void plan(const device uint* indices [[buffer(0)]],
                     const constant uint& routes [[buffer(1)]],
                     device uint* order [[buffer(2)]],
                     device uint* offsets [[buffer(3)]],
                     device uint* tiles [[buffer(4)]],
                     uint index [[thread_index_in_threadgroup]],
                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]]) {
  threadgroup moefast::PlanMemory<EXPERTS, SIMDGROUPS> memory;
  moefast::plan<EXPERTS, SIMDGROUPS, HEIGHT>(indices, routes, order, offsets, tiles, memory,
                                             {0, 1, index, simdgroup, lane});
}

template <int EXPERTS, int SIMDGROUPS>
[[kernel]] void plan_count(const device uint* indices [[buffer(0)]],
                           const constant uint& routes [[buffer(1)]],
                           device uint* counts [[buffer(2)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint groups [[threadgroups_per_grid]],
                           uint index [[thread_index_in_threadgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]]) {
  threadgroup moefast::PlanMemory<EXPERTS, SIMDGROUPS> memory;
  moefast::plan_count(indices, routes, counts, memory, {group, groups, index, simdgroup, lane});
}

template <int EXPERTS, int SIMDGROUPS, int HEIGHT>
[[kernel]] void plan_place(const device uint* indices [[buffer(0)]],
                           const constant uint& routes [[buffer(1)]],
                           const device uint* counts [[buffer(2)]],
                           device uint* order [[buffer(3)]],
                           device uint* offsets [[buffer(4)]],
                           device uint* tiles [[buffer(5)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint groups [[threadgroups_per_grid]],
                           uint index [[thread_index_in_threadgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]]) {
  threadgroup moefast::PlanMemory<EXPERTS, SIMDGROUPS> memory;
  moefast::plan_place<EXPERTS, SIMDGROUPS, HEIGHT>(indices, routes, counts, order, offsets, tiles,
                                                   memory, {group, groups, index, simdgroup, lane});
}

// clang-format off
template [[host_name("plan_e60_h16")]] [[kernel]] decltype(plan<60, 32, 16>) plan<60, 32, 16>;
template [[host_name("plan_e1024_h64")]] [[kernel]] decltype(plan<1024, 8, 64>) plan<1024, 8, 64>;
template [[host_name("plan_count_e256")]] [[kernel]] decltype(plan_count<256, 32>) plan_count<256, 32>;
template [[host_name("plan_place_e256_h32")]] [[kernel]] decltype(plan_place<256, 32, 32>) plan_place<256, 32, 32>;
// clang-format on

#endif
