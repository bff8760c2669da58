// Where threads may run: off one core, and nowhere that their caller may not.
#include "placement.h"

#include <atomic>
#include <thread>
#include <vector>

#include "core_set.h"
#include "expect.h"
#include "pool.h"

using namespace moefast;
using namespace moefast::testing;

namespace {

#ifdef __linux__

// Threads that do nothing until the end of its scope, and know where they may run.
class Idlers {
 public:
  explicit Idlers(int count) : seen_(count, CoreSet::allowed()) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this, i] {
        while (!stop_) {
          std::this_thread::yield();
        }
        seen_[i] = CoreSet::allowed();
      });
    }
  }
  std::vector<std::thread>& threads() { return threads_; }

  const std::vector<CoreSet>& sets_at_the_end() {
    stop_ = true;
    for (std::thread& thread : threads_) {
      thread.join();
    }
    return seen_;
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<CoreSet> seen_;
  std::vector<std::thread> threads_;
};

int first_of(const CoreSet& set) {
  int core = 0;
  while (!set.contains(core)) {
    ++core;
  }
  return core;
}

// On a machine, or of a process, with one core nothing can be kept off it: the case is empty there.
void threads_keep_off_one_core() {
  const CoreSet mine = CoreSet::allowed();
  if (mine.count() < 2) {
    return;
  }
  const int core = first_of(mine);
  Idlers idlers(2);
  EXPECT(keep_off(core, idlers.threads()));
  for (const CoreSet& set : idlers.sets_at_the_end()) {
    EXPECT(!set.contains(core));
    EXPECT(set.count() == mine.count() - 1);
  }
  EXPECT(CoreSet::allowed().count() == mine.count());  // the caller's own is as it was
}

void another_core_takes_the_place_of_the_first() {
  CoreSet mine = CoreSet::allowed();
  if (mine.count() < 2) {
    return;
  }
  const int first = first_of(mine);
  mine.remove(first);
  const int second = first_of(mine);
  Idlers idlers(1);
  EXPECT(keep_off(first, idlers.threads()));
  EXPECT(keep_off(second, idlers.threads()));
  const CoreSet set = idlers.sets_at_the_end()[0];
  EXPECT(set.contains(first));
  EXPECT(!set.contains(second));
}

void nothing_happens_without_another_core() {
  const CoreSet mine = CoreSet::allowed();
  CoreSet one = mine;
  while (one.count() > 1) {
    one.remove(first_of(one));
  }
  Idlers idlers(1);
  std::thread([&] {
    EXPECT(one.confine(pthread_self()));
    EXPECT(!keep_off(first_of(one), idlers.threads()));
  }).join();
  EXPECT(!keep_off(-1, idlers.threads()));
  if (mine.count() > 1) {
    std::thread([&] {
      CoreSet others = mine;
      others.remove(first_of(mine));
      EXPECT(others.confine(pthread_self()));
      EXPECT(
          !keep_off(first_of(mine), idlers.threads()));  // the caller is not allowed there itself
    }).join();
  }
  EXPECT(idlers.sets_at_the_end()[0].count() == mine.count());
}

// The system may move the caller whenever it likes: only runs that began where the look before them
// found the caller count.
void a_pool_keeps_its_workers_off_the_callers_core() {
  const CoreSet mine = CoreSet::allowed();
  if (usable_cores() < 2) {
    return;
  }
  Pool pool(2);
  const auto caller = std::this_thread::get_id();
  int seen = 0;
  for (int round = 0; round < 10000 && seen < 20; ++round) {
    const int before = core_here();
    std::atomic<int> inside{0}, wrong{0};
    std::atomic<bool> moved{false};
    pool.run(2, [&](int64_t, int64_t, int) {
      if (std::this_thread::get_id() == caller) {
        moved = core_here() != before;
        const auto start = Clock::now();  // leave the other item to the worker
        while (inside == 0 && seconds_since(start) < 1e-3) {
        }
      } else {
        const CoreSet set = CoreSet::allowed();
        wrong += set.contains(before) || set.count() != mine.count() - 1;
        ++inside;
      }
    });
    if (!moved && core_here() == before && inside > 0) {
      ++seen;
      EXPECT(wrong == 0);
    }
  }
  EXPECT(seen == 20);
}

#endif

void a_core_has_a_number() {
  EXPECT(core_here() >= -1);
}

}  // namespace

int main() {
#define CASE(name) run_case(#name, name, nullptr)
  CASE(a_core_has_a_number);
#ifdef __linux__
  CASE(threads_keep_off_one_core);
  CASE(another_core_takes_the_place_of_the_first);
  CASE(nothing_happens_without_another_core);
  CASE(a_pool_keeps_its_workers_off_the_callers_core);
#endif
  return verdict();
}
