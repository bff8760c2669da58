// On which cores threads run.
#ifndef MOEFAST_CPU_PLACEMENT_H
#define MOEFAST_CPU_PLACEMENT_H

#include <thread>
#include <vector>

namespace moefast {

// The core that this thread is on, or -1 where the system does not say.
int core_here();

// Lets `threads` run wherever this thread may, but on `core`. Where that leaves no core, or the
// system has no such setting, nothing happens; the result says whether it did.
bool keep_off(int core, std::vector<std::thread>& threads);

}  // namespace moefast

#endif
