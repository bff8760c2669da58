// The order in which the threads of a threadgroup run, and where they wait for each other.
#pragma once
#include "worker.h"

namespace emulator {

Worker* take_worker();
void resume(Worker&, Fiber&);
// Runs the prepared fibers of the threadgroup until all have returned.
bool schedule(Worker&);
// The place of a threadgroup variable, from the start of the worker's memory.
uint32_t threadgroup_variable(
    Worker&, uint32_t id, uint32_t bytes, uint32_t alignment, uint32_t site);

}  // namespace emulator
