// What a forked child must have anew: locks and threads.
#ifndef MOEFAST_CPU_PER_PROCESS_H
#define MOEFAST_CPU_PER_PROCESS_H

#include <atomic>
#include <cstdint>

namespace moefast {

// How many fork()s lie between this process and the one that loaded this code (pool.cpp counts).
uint32_t fork_count();

// A T of this process, made at its first use, and made anew at the first use in a forked child. The
// parent's is left as it is there: its threads are not in the child, and its locks may be held by
// one of them for ever.
template <class T>
class PerProcess {
 public:
  PerProcess() = default;
  PerProcess(const PerProcess&) = delete;
  PerProcess& operator=(const PerProcess&) = delete;
  ~PerProcess() {
    Instance* instance = instance_.load();
    if (instance != nullptr && instance->forks == fork_count()) {
      delete instance;
    }
  }

  // `arguments` make it, if it has to be made. Any number of threads may ask at once.
  template <class... Arguments>
  T& get(const Arguments&... arguments) {
    Instance* instance = instance_.load(std::memory_order_acquire);
    while (instance == nullptr || instance->forks != fork_count()) {
      auto* fresh = new Instance(arguments...);
      if (instance_.compare_exchange_strong(instance, fresh, std::memory_order_acq_rel)) {
        return fresh->value;
      }
      delete fresh;  // another thread was faster
    }
    return instance->value;
  }

 private:
  struct Instance {
    template <class... Arguments>
    explicit Instance(const Arguments&... arguments) : value(arguments...) {}

    const uint32_t forks = fork_count();
    T value;
  };

  std::atomic<Instance*> instance_{nullptr};
};

}  // namespace moefast

#endif
