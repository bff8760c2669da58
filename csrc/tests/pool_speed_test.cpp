// How fast the thread pool is: the latency of a run, and what is left of its speed when other
// processes want the cores. A plain program: prints each case and returns 1 if one failed.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "expect.h"
#include "pool.h"

#ifdef __linux__
#include <sched.h>
#endif

#if defined(__SANITIZE_THREAD__)
#define MOEFAST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MOEFAST_TSAN 1
#endif
#endif

using namespace moefast;
using namespace moefast::testing;

namespace {

// Printed, not judged: the machine may be busy.
void latency() {
  for (const int threads : {1, 2}) {
    Pool pool(threads);
    for (const int pause : {0, 200}) {  // us between runs: workers still spin, or sleep
      std::vector<double> times;
      for (int run = 0; run < (pause ? 500 : 5000); ++run) {
        if (pause) {
          std::this_thread::sleep_for(std::chrono::microseconds(pause));
        }
        const auto start = Clock::now();
        pool.run(threads, [](int64_t, int64_t, int) {});
        times.push_back(seconds_since(start) * 1e6);
      }
      std::sort(times.begin(), times.end());
      std::printf("  %d threads, %3d us apart: median %.2f us, 95%% %.2f us\n", threads, pause,
                  times[times.size() / 2], times[times.size() * 95 / 100]);
    }
  }
}

#ifndef MOEFAST_TSAN

// A process that wants one core for itself, until the end of its scope.
class Competitor {
 public:
  explicit Competitor(int core) : process_(fork()) {
    if (process_ == 0) {
      alarm(120);
#ifdef __linux__
      cpu_set_t allowed, one;
      CPU_ZERO(&one);
      if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int i = 0, seen = 0; i < CPU_SETSIZE; ++i) {
          if (CPU_ISSET(i, &allowed) && seen++ == core) {
            CPU_SET(i, &one);
            sched_setaffinity(0, sizeof one, &one);
            break;
          }
        }
      }
#else
      (void)core;
#endif
      const volatile bool forever = true;
      while (forever) {
      }
    }
  }
  Competitor(const Competitor&) = delete;
  ~Competitor() {
    if (process_ > 0) {
      kill(process_, SIGKILL);
      waitpid(process_, nullptr, 0);
    }
  }

 private:
  pid_t process_;
};

enum Kind { kArithmetic, kMemory };

// Runs of 32 items of some ten microseconds each, as many as fit into the time; items per second.
double throughput(Pool& pool, Kind kind, double seconds) {
  constexpr int64_t kItems = 32;
  constexpr int64_t kWords = 16 << 10;  // of an item: 128 KB
  static const std::vector<uint64_t> memory(512 * kWords, 1);
  std::atomic<uint64_t> sink{0};
  int64_t items = 0;
  const auto start = Clock::now();
  while (seconds_since(start) < seconds) {
    pool.run(kItems, [&](int64_t item, int64_t, int) {
      uint64_t sum = static_cast<uint64_t>(item);
      if (kind == kArithmetic) {
        for (int i = 0; i < 8000; ++i) {
          sum = sum * 6364136223846793005u + 1442695040888963407u;
        }
      } else {
        const uint64_t* at = memory.data() + (items + item) % 512 * kWords;
        for (int64_t i = 0; i < kWords; ++i) {
          sum += at[i];
        }
      }
      sink += sum;
    });
    items += kItems;
  }
  return static_cast<double>(items) / seconds_since(start);
}

// Other processes take their share of the cores and not more: two threads on two cores keep about
// three quarters of their speed beside one competitor and half beside two. Pools that wait for
// every one of their threads at every run keep a few hundredths. The bounds leave room for a
// machine that is busy anyway, and so do three attempts.
void competitors() {
  Pool pool(2);
  for (const Kind kind : {kArithmetic, kMemory}) {
    bool kept = false;
    for (int attempt = 0; attempt < 3 && !kept; ++attempt) {
      throughput(pool, kind, 0.05);
      const double alone = throughput(pool, kind, 0.4);
      const auto first = std::make_unique<Competitor>(0);
      const double beside_one = throughput(pool, kind, 0.6);
      const auto second = std::make_unique<Competitor>(1);
      const double beside_two = throughput(pool, kind, 0.6);
      std::printf(
          "  %s: %.1f items/ms alone, beside one competitor %.2f of that, beside two %.2f\n",
          kind == kMemory ? "memory" : "arithmetic", alone / 1e3, beside_one / alone,
          beside_two / alone);
      kept = alone < 8 * beside_one && alone < 16 * beside_two;
    }
    EXPECT(kept);
  }
}

#endif

}  // namespace

// pool_speed_test [part of a case's name]
int main(int argc, char** argv) {
  const char* only = argc > 1 ? argv[1] : nullptr;
  run_case("latency", latency, only);
#ifndef MOEFAST_TSAN
  run_case("competitors", competitors, only);
#else
  // TSan takes notes of every read, and after a fork() copies each page of its notes.
  std::printf("competitors: left out, TSan itself is slow beside a child process\n");
#endif
  return verdict();
}
