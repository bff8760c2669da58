// A stable counting sort of routes by expert, and the tiles it falls into: for plan.metal, and for
// kernels that make their plan in the launch that routes.
#ifndef MOEFAST_PLAN_H
#define MOEFAST_PLAN_H

#include "common.h"

namespace moefast {

// What a threadgroup of SIMDGROUPS simdgroups sorts with. Key EXPERTS is that of every route whose
// expert does not exist.
template <int EXPERTS, int SIMDGROUPS>
struct PlanMemory {
  // Of a simdgroup's routes, by key; later: how many of the threadgroup's routes come before them.
  // Hence at most 65535 routes to a threadgroup.
  ushort counts[SIMDGROUPS][EXPERTS + 1];
  uint starts[EXPERTS + 2];
  uint tiles[EXPERTS + 2];
  uint sums[SIMDGROUPS];
};

// Where a thread stands, in one dimension.
struct PlanThread {
  uint group, groups, index, simdgroup, lane;
};

constexpr int bit_width(uint n) {
  int bits = 0;
  while (n >> bits != 0) {
    bits++;
  }
  return bits;
}

// The lanes that hold this lane's key, as a mask. KEYS: keys are below it.
template <int KEYS>
inline uint lanes_alike(uint key) {
  uint alike = 0xffffffff;
  for (int bit = 0; bit < bit_width(KEYS - 1); bit++) {
    const bool set = (key >> bit & 1) != 0;
    const uint vote = uint(simd_vote::vote_t(simd_ballot(set)));
    alike &= set ? vote : ~vote;
  }
  return alike;
}

// The routes of one simdgroup: a run of them, all of the same length but for those at the end.
struct PlanRun {
  uint first, last;
};

template <int SIMDGROUPS>
inline PlanRun run_of(PlanThread at, uint routes) {
  const uint share = (routes + at.groups * SIMDGROUPS - 1) / (at.groups * SIMDGROUPS);
  const uint length = (share + kLanes - 1) / kLanes * kLanes;
  const uint first = min((at.group * SIMDGROUPS + at.simdgroup) * length, routes);
  return {first, min(first + length, routes)};
}

// A key for each lane; EXPERTS + 1 past the end of the run.
template <int EXPERTS, typename Indices>
inline uint key_of(Indices indices, uint route, PlanRun run) {
  return route < run.last ? min(uint(indices[route]), uint(EXPERTS)) : uint(EXPERTS + 1);
}

// Counts the threadgroup's routes: memory.counts becomes, for each simdgroup, how many of the
// threadgroup's earlier routes have a key, and memory.starts how many of all its routes.
template <int EXPERTS, int SIMDGROUPS, typename Indices>
inline void count_routes(Indices indices,
                         uint routes,
                         threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                         PlanThread at) {
  constexpr uint kThreads = SIMDGROUPS * kLanes;
  for (uint i = at.index; i < SIMDGROUPS * (EXPERTS + 1); i += kThreads) {
    memory.counts[i / (EXPERTS + 1)][i % (EXPERTS + 1)] = 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const PlanRun run = run_of<SIMDGROUPS>(at, routes);
  for (uint from = run.first; from < run.last; from += kLanes) {
    const uint key = key_of<EXPERTS>(indices, from + at.lane, run);
    const uint alike = lanes_alike<EXPERTS + 2>(key);
    if (key <= EXPERTS && ctz(alike) == at.lane) {
      memory.counts[at.simdgroup][key] += popcount(alike);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint key = at.index; key <= EXPERTS; key += kThreads) {
    uint sum = 0;
    for (int s = 0; s < SIMDGROUPS; s++) {
      const uint count = memory.counts[s][key];
      memory.counts[s][key] = sum;
      sum += count;
    }
    memory.starts[key] = sum;
  }
}

// values[0..SIZE] become the sums of those before them. All threads; begins and ends with a
// barrier.
template <int SIZE, int SIMDGROUPS>
inline void sums_before(threadgroup uint* values, threadgroup uint* sums, PlanThread at) {
  constexpr uint kEach = (SIZE + SIMDGROUPS * kLanes - 1) / (SIMDGROUPS * kLanes);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint first = at.index * kEach, last = min(first + kEach, uint(SIZE));
  uint mine = 0;
  for (uint i = first; i < last; i++) {
    mine += values[i];
  }
  uint sum = simd_prefix_exclusive_sum(mine);
  if (at.lane == kLanes - 1) {
    sums[at.simdgroup] = sum + mine;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum += simd_sum(at.lane < at.simdgroup ? sums[at.lane] : 0);
  for (uint i = first; i < last; i++) {
    const uint value = values[i];
    values[i] = sum;
    sum += value;
  }
  if (first < SIZE && last == SIZE) {
    values[SIZE] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// memory.starts, how many routes have each key, becomes where the key's routes start; memory.tiles
// likewise for its tiles of HEIGHT routes; both with the total at the end.
template <int EXPERTS, int SIMDGROUPS, int HEIGHT>
inline void place_experts(threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory, PlanThread at) {
  for (uint key = at.index; key <= EXPERTS; key += SIMDGROUPS * kLanes) {
    memory.tiles[key] = (memory.starts[key] + HEIGHT - 1) / HEIGHT;
  }
  sums_before<EXPERTS + 1, SIMDGROUPS>(memory.starts, memory.sums, at);
  sums_before<EXPERTS + 1, SIMDGROUPS>(memory.tiles, memory.sums, at);
}

// As many tiles as there can be: plan.py allocates them.
template <int EXPERTS, int HEIGHT>
inline uint most_tiles(uint routes) {
  return routes / HEIGHT + min(uint(EXPERTS + 1), routes);
}

// Writes offsets [EXPERTS + 2] and tiles [most_tiles, 3]: expert, first place, rows; of tiles that
// are not needed all three are 0. The threadgroups share the work.
template <int EXPERTS, int SIMDGROUPS, int HEIGHT>
inline void write_tiles(threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                        uint routes,
                        device uint* offsets,
                        device uint* tiles,
                        PlanThread at) {
  const uint threads = at.groups * SIMDGROUPS * kLanes;
  const uint first = at.group * SIMDGROUPS * kLanes + at.index;
  for (uint key = first; key < EXPERTS + 2; key += threads) {
    offsets[key] = memory.starts[key];
  }
  for (uint tile = first; tile < most_tiles<EXPERTS, HEIGHT>(routes); tile += threads) {
    uint expert = 0, place = 0, rows = 0;
    if (tile < memory.tiles[EXPERTS + 1]) {
      // The last key whose tiles start here or before: those without a tile start where the next
      // does.
      for (uint step = 1u << bit_width(EXPERTS); step > 0; step /= 2) {
        if (expert + step <= EXPERTS && memory.tiles[expert + step] <= tile) {
          expert += step;
        }
      }
      place = memory.starts[expert] + (tile - memory.tiles[expert]) * HEIGHT;
      rows = min(uint(HEIGHT), memory.starts[expert + 1] - place);
    }
    tiles[3 * tile] = expert;
    tiles[3 * tile + 1] = place;
    tiles[3 * tile + 2] = rows;
  }
}

// Writes order: each route to where its key's routes start, after those before it. memory.starts
// counts the key's routes in earlier threadgroups in.
template <int EXPERTS, int SIMDGROUPS, typename Indices>
inline void place_routes(Indices indices,
                         uint routes,
                         device uint* order,
                         threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                         PlanThread at) {
  const PlanRun run = run_of<SIMDGROUPS>(at, routes);
  for (uint from = run.first; from < run.last; from += kLanes) {
    const uint route = from + at.lane;
    const uint key = key_of<EXPERTS>(indices, route, run);
    const uint alike = lanes_alike<EXPERTS + 2>(key);
    if (key <= EXPERTS) {
      const uint before =
          memory.counts[at.simdgroup][key] + popcount(alike & ((1u << at.lane) - 1));
      order[memory.starts[key] + before] = route;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (key <= EXPERTS && ctz(alike) == at.lane) {
      memory.counts[at.simdgroup][key] += popcount(alike);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// The whole plan, by one threadgroup.
template <int EXPERTS, int SIMDGROUPS, int HEIGHT, typename Indices>
inline void plan(Indices indices,
                 uint routes,
                 device uint* order,
                 device uint* offsets,
                 device uint* tiles,
                 threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                 PlanThread at) {
  count_routes(indices, routes, memory, at);
  place_experts<EXPERTS, SIMDGROUPS, HEIGHT>(memory, at);
  write_tiles<EXPERTS, SIMDGROUPS, HEIGHT>(memory, routes, offsets, tiles, at);
  place_routes(indices, routes, order, memory, at);
}

// First of two launches: how many of each threadgroup's routes have a key, [groups, EXPERTS + 1].
template <int EXPERTS, int SIMDGROUPS, typename Indices>
inline void plan_count(Indices indices,
                       uint routes,
                       device uint* counts,
                       threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                       PlanThread at) {
  count_routes(indices, routes, memory, at);
  for (uint key = at.index; key <= EXPERTS; key += SIMDGROUPS * kLanes) {  // each its own
    counts[at.group * (EXPERTS + 1) + key] = memory.starts[key];
  }
}

// Second: the plan, by threadgroups as many as counted.
template <int EXPERTS, int SIMDGROUPS, int HEIGHT, typename Indices, typename Counts>
inline void plan_place(Indices indices,
                       uint routes,
                       Counts counts,
                       device uint* order,
                       device uint* offsets,
                       device uint* tiles,
                       threadgroup PlanMemory<EXPERTS, SIMDGROUPS>& memory,
                       PlanThread at) {
  constexpr uint kThreads = SIMDGROUPS * kLanes;
  constexpr uint kEach = (EXPERTS + kThreads) / kThreads;
  count_routes(indices, routes, memory, at);
  uint earlier[kEach];  // in earlier threadgroups
#pragma unroll
  for (uint i = 0; i < kEach; i++) {
    const uint key = at.index + i * kThreads;
    uint sum = 0;
    for (uint group = 0; group < at.groups && key <= EXPERTS; group++) {
      if (group == at.group) {
        earlier[i] = sum;
      }
      sum += counts[group * (EXPERTS + 1) + key];
    }
    if (key <= EXPERTS) {
      memory.starts[key] = sum;
    }
  }
  place_experts<EXPERTS, SIMDGROUPS, HEIGHT>(memory, at);
  write_tiles<EXPERTS, SIMDGROUPS, HEIGHT>(memory, routes, offsets, tiles, at);
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (uint i = 0; i < kEach; i++) {
    const uint key = at.index + i * kThreads;
    if (key <= EXPERTS) {
      memory.starts[key] += earlier[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  place_routes(indices, routes, order, memory, at);
}

}  // namespace moefast

#endif
