// What this machine can do at most: how fast its cores read memory, and multiply and add.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>

#include "check.h"
#include "engine.h"

namespace moefast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRuns = 5;

// The shortest of a few runs of `task`, on so many threads at once. Seconds.
template <class Task>
double shortest(Pool& pool, int threads, Task&& task) {
  double least = 1e30;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = Clock::now();
    pool.run(threads, [&](int64_t item, int64_t, int) { task(item); });
    least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return least;
}

int checked(const moefast_engine& engine, int threads) {
  if (threads < 1 || threads > engine.pool.threads()) {
    refuse("threads must be in 1..%d, got %d.", engine.pool.threads(), threads);
  }
  return threads;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace
}  // namespace moefast

using namespace moefast;

extern "C" {

int moefast_measure_read(moefast_engine* engine,
                         int threads,
                         size_t bytes,
                         double* bytes_per_second) {
  return run_on(engine, "measure_read", [&](moefast_engine& on) {
    check_pointer("bytes_per_second", bytes_per_second);
    const size_t each = bytes / 4096 * 4096, all = each * static_cast<size_t>(checked(on, threads));
    if (each == 0) {
      refuse("bytes must be at least 4096, got %zu.", bytes);
    }
    const std::unique_ptr<void, Free> memory(std::aligned_alloc(4096, all));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    auto* data = static_cast<uint8_t*>(memory.get());
    std::memset(data, 1, all);  // so that every page is there, and another one
    std::unique_ptr<uint64_t[]> sums(new uint64_t[threads]);
    const double seconds = shortest(on.pool, threads, [&](int64_t item) {
      sums[item] = on.isa.read(data + static_cast<size_t>(item) * each, each);
    });
    *bytes_per_second = static_cast<double>(all) / seconds;
  });
}

int moefast_measure_flops(moefast_engine* engine, int threads, double* flops) {
  return run_on(engine, "measure_flops", [&](moefast_engine& on) {
    check_pointer("flops", flops);
    constexpr int64_t kRounds = 1 << 20;
    const int used = checked(on, threads);
    std::unique_ptr<double[]> done(new double[used]());
    const double seconds =
        shortest(on.pool, used, [&](int64_t item) { done[item] = on.isa.flops(kRounds); });
    double all = 0.0;
    for (int i = 0; i < used; ++i) {
      all += done[i];
    }
    *flops = all / seconds;
  });
}

}  // extern "C"
