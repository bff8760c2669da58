// The thread pool: every item once, whatever happens around it. A plain program: prints each case
// and returns 1 if one failed.
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"

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

// -- items ----------------------------------------------------------------------------------------

void every_item_once() {
  for (const int threads : {1, 2, 3, 8}) {
    Pool pool(threads);
    EXPECT(pool.threads() == threads);
    for (const int64_t count : {0, 1, 2, 3, 7, 8, 9, 100, 10007}) {
      std::vector<std::atomic<int>> times(count);
      std::atomic<bool> in_range{true};
      pool.run(count, [&](int64_t item, int64_t, int thread) {
        ++times[item];
        if (thread < 0 || thread >= threads) {
          in_range = false;
        }
      });
      EXPECT(in_range);
      EXPECT(std::all_of(times.begin(), times.end(), [](auto& n) { return n == 1; }));
    }
  }
}

void fewer_threads_than_one_is_one() {
  Pool pool(0);
  EXPECT(pool.threads() == 1);
  int items = 0;
  pool.run(5, [&](int64_t, int64_t, int) { ++items; });
  EXPECT(items == 5);
}

// `next` is kept, items of a thread ascend, and two threads never have one number.
void items_are_announced() {
  for (const int threads : {1, 2, 5}) {
    Pool pool(threads);
    struct alignas(64) Seen {
      int64_t last = -1;
      int64_t announced = -1;
      std::atomic<bool> busy{false};
    };
    std::atomic<int64_t> announced{0};
    for (int round = 0; round < 50; ++round) {
      constexpr int64_t kCount = 500;
      std::vector<Seen> seen(threads);
      pool.run(kCount, [&](int64_t item, int64_t next, int thread) {
        Seen& mine = seen[thread];
        EXPECT(!mine.busy.exchange(true));
        EXPECT(mine.announced == -1 || mine.announced == item);
        EXPECT(item > mine.last);
        EXPECT(next == -1 || (next > item && next < kCount));
        mine.last = item;
        mine.announced = next;
        announced += next >= 0;
        mine.busy = false;
      });
      for (const Seen& mine : seen) {
        EXPECT(mine.announced == -1);  // nothing was promised and not given
      }
    }
    EXPECT(announced >= 50 * (500 - 3 * threads));  // nearly all
  }
}

// Whether `count` items run at once: each waits for the others, for a while.
bool together(Pool& pool, int count) {
  std::atomic<int> arrived{0};
  const auto start = Clock::now();
  pool.run(count, [&](int64_t, int64_t, int) {
    ++arrived;
    while (arrived < count && seconds_since(start) < 10) {
      std::this_thread::yield();
    }
  });
  return seconds_since(start) < 10;
}

// An item never waits behind another of the same thread while a thread is free.
void last_items_are_not_held_back() {
  Pool pool(2), larger(4);
  for (int round = 0; round < 3; ++round) {
    EXPECT(together(pool, 2));
    EXPECT(together(larger, 3));
    EXPECT(together(larger, 4));
  }
}

void results_are_visible() {
  Pool pool(4);
  std::vector<int64_t> squares(3000);
  for (int round = 0; round < 100; ++round) {
    pool.run(3000, [&](int64_t item, int64_t, int) { squares[item] = item * item + round; });
    int64_t wrong = 0;
    for (int64_t i = 0; i < 3000; ++i) {
      wrong += squares[i] != i * i + round;
    }
    EXPECT(wrong == 0);
  }
}

void many_tiny_runs() {
  Pool pool(2);
  std::atomic<int64_t> items{0};
  for (int run = 0; run < 20000; ++run) {
    pool.run(1 + run % 4, [&](int64_t, int64_t, int) { ++items; });
  }
  EXPECT(items == 50000);
}

// -- callers --------------------------------------------------------------------------------------

void several_callers() {
  constexpr int kThreads = 3;
  Pool pool(kThreads);
  std::atomic<bool> busy[kThreads] = {};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int run = 0; run < 300; ++run) {
        const int64_t count = 1 + (run + caller) % 5;  // some run inline
        std::atomic<int64_t> sum{0};
        pool.run(count, [&](int64_t item, int64_t, int thread) {
          EXPECT(!busy[thread].exchange(true));
          sum += item + caller;
          busy[thread] = false;
        });
        EXPECT(sum == count * (count - 1) / 2 + caller * count);
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

void exceptions_come_back() {
  constexpr int64_t kCount = 20000;
  for (const int threads : {1, 2, 4}) {
    Pool pool(threads);
    for (int round = 0; round < 20; ++round) {
      std::atomic<int64_t> begun{0};
      std::atomic<bool> thrown{false};
      std::string caught;
      try {
        pool.run(kCount, [&](int64_t item, int64_t, int) {
          ++begun;
          if (item == 5) {
            thrown = true;
            throw std::runtime_error("item " + std::to_string(item));
          }
          while (item > 5 && !thrown) {  // the others are not through before it is on its way
            std::this_thread::yield();
          }
          if (thrown) {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
          }
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      EXPECT(caught == "item 5");
      EXPECT(begun < kCount / 2);  // the rest is dropped
      EXPECT(together(pool, threads));
    }
    for (int round = 0; round < 200; ++round) {  // several at once: one of them comes back
      std::atomic<bool> caught{false};
      try {
        pool.run(50, [&](int64_t item, int64_t, int) { throw item; });
      } catch (const int64_t item) {
        caught = item >= 0 && item < 50;
      }
      EXPECT(caught);
    }
  }
}

void pools_come_and_go() {
  for (int round = 0; round < 100; ++round) {
    Pool unused(4);
    Pool used(3);
    std::atomic<int> items{0};
    used.run(round % 7, [&](int64_t, int64_t, int) { ++items; });
    EXPECT(items == round % 7);
  }
}

void more_threads_than_cores() {
  Pool pool(std::max(8, 4 * usable_cores()));
  std::atomic<int64_t> items{0};
  const auto start = Clock::now();
  for (int run = 0; run < 1000; ++run) {
    pool.run(64, [&](int64_t, int64_t, int) { ++items; });
  }
  const double seconds = seconds_since(start);
  EXPECT(items == 64000);
  EXPECT(seconds < 30);
  std::printf("  %d threads on %d cores: %.0f us a run\n", pool.threads(), usable_cores(),
              seconds * 1e3);
}

// -- fork -----------------------------------------------------------------------------------------

// TSan gives up where a process that has threads forks and the child starts more of them.
#ifndef MOEFAST_TSAN

// Whether `body` comes back true in a forked child, which is killed if it hangs.
template <class Body>
bool in_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

bool works(Pool& pool) {
  for (int run = 0; run < 20; ++run) {
    std::vector<std::atomic<int>> times(100);
    pool.run(100, [&](int64_t item, int64_t, int) { ++times[item]; });
    if (!std::all_of(times.begin(), times.end(), [](auto& n) { return n == 1; })) {
      return false;
    }
  }
  return together(pool, pool.threads());
}

void fork_with_a_lock_held() {
  PerProcess<std::mutex> mutex;
  std::atomic<bool> held{false}, release{false};
  std::thread holder([&] {
    const std::lock_guard<std::mutex> lock(mutex.get());
    held = true;
    while (!release) {
      std::this_thread::yield();
    }
  });
  while (!held) {
    std::this_thread::yield();
  }
  EXPECT(!mutex.get().try_lock());
  EXPECT(in_child([&] {
    const std::lock_guard<std::mutex> lock(mutex.get());  // or hangs
    return true;
  }));
  release = true;
  holder.join();
}

void fork_between_runs() {
  auto pool = std::make_unique<Pool>(3);
  EXPECT(in_child([&] { return works(*pool); }));  // no thread has been started yet
  EXPECT(works(*pool));
  EXPECT(in_child([&] { return works(*pool); }));
  EXPECT(in_child([&] {  // a child's child
    return works(*pool) && in_child([&] { return works(*pool); }) && works(*pool);
  }));
  EXPECT(in_child([&] {  // ends in the child, unused or used
    if (getpid() % 2) {
      works(*pool);
    }
    pool.reset();
    return true;
  }));
  EXPECT(in_child([&] {  // several threads find the parent's pool at once
    std::atomic<int> good{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&] { good += works(*pool); });
    }
    for (std::thread& caller : callers) {
      caller.join();
    }
    pool.reset();
    return good == 4;
  }));
  EXPECT(works(*pool));
}

void fork_during_runs() {
  Pool pool(3);
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {  // one runs, one waits its turn
    callers.emplace_back([&] {
      while (!stop) {
        pool.run(10, [](int64_t, int64_t, int) {
          const auto start = Clock::now();
          while (seconds_since(start) < 20e-6) {
          }
        });
      }
    });
  }
  for (int i = 0; i < 30; ++i) {
    EXPECT(in_child([&] { return works(pool); }));
  }
  stop = true;
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT(works(pool));
}

#endif

}  // namespace

// pool_test [part of a case's name]
int main(int argc, char** argv) {
  const char* only = argc > 1 ? argv[1] : nullptr;
#define CASE(name) run_case(#name, name, only)
  CASE(every_item_once);
  CASE(fewer_threads_than_one_is_one);
  CASE(items_are_announced);
  CASE(last_items_are_not_held_back);
  CASE(results_are_visible);
  CASE(many_tiny_runs);
  CASE(several_callers);
  CASE(exceptions_come_back);
  CASE(pools_come_and_go);
  CASE(more_threads_than_cores);
#ifndef MOEFAST_TSAN
  CASE(fork_with_a_lock_held);
  CASE(fork_between_runs);
  CASE(fork_during_runs);
#else
  std::printf("fork_*: left out, TSan cannot follow a process with threads through fork()\n");
#endif
  return verdict();
}
