// A set of cores as the system keeps it for each thread, on machines of any size.
#ifndef MOEFAST_CPU_CORE_SET_H
#define MOEFAST_CPU_CORE_SET_H

#ifdef __linux__
#include <pthread.h>
#include <sched.h>

#include <cstddef>
#include <vector>

namespace moefast {

class CoreSet {
 public:
  // Where the calling thread may run. Empty if the system does not say.
  static CoreSet allowed() {
    // The call fails for masks shorter than the kernel's.
    for (int cores = 1024; cores <= 1 << 20; cores *= 2) {
      CoreSet set(CPU_ALLOC_SIZE(cores));
      if (sched_getaffinity(0, set.bytes(), set.mask_.data()) == 0) {
        return set;
      }
    }
    return CoreSet(0);
  }

  int count() const { return CPU_COUNT_S(bytes(), mask_.data()); }
  bool contains(int core) const { return CPU_ISSET_S(core, bytes(), mask_.data()); }
  void remove(int core) { CPU_CLR_S(core, bytes(), mask_.data()); }

  // Whether `thread` runs nowhere else from now on.
  bool confine(pthread_t thread) const {
    return pthread_setaffinity_np(thread, bytes(), mask_.data()) == 0;
  }

 private:
  explicit CoreSet(size_t bytes) : mask_((bytes + sizeof(cpu_set_t) - 1) / sizeof(cpu_set_t)) {
    for (cpu_set_t& part : mask_) {
      CPU_ZERO(&part);
    }
  }
  size_t bytes() const { return mask_.size() * sizeof(cpu_set_t); }

  std::vector<cpu_set_t> mask_;
};

}  // namespace moefast

#endif
#endif
