// How many cores this process may use.
#ifndef MOEFAST_CPU_CORES_H
#define MOEFAST_CPU_CORES_H

#include <string>

namespace moefast {

// Cores of the machine, of the affinity mask or of the cgroup's quota, whichever is least; at
// least 1. Reads files: ask once.
int usable_cores();

// The quota alone, rounded up: the least along the way from this process's cgroup to the root; 0
// where there is none. `membership` is the text of /proc/self/cgroup, `root` the folder where
// cgroups are mounted.
int quota_cores(const std::string& membership, const std::string& root);

}  // namespace moefast

#endif
