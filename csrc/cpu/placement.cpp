#include "placement.h"

#include "core_set.h"

namespace moefast {

int core_here() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

bool keep_off(int core, std::vector<std::thread>& threads) {
#ifdef __linux__
  CoreSet cores = CoreSet::allowed();
  if (core < 0 || !cores.contains(core) || cores.count() < 2) {
    return false;
  }
  cores.remove(core);
  bool all = true;
  for (std::thread& thread : threads) {
    all = cores.confine(thread.native_handle()) && all;
  }
  return all;
#else
  (void)core;
  (void)threads;
  return false;
#endif
}

}  // namespace moefast
