// How a run goes. The caller writes down the job and opens the door. Workers that come by while it
// is open go in and take items, as the caller does; whoever finds no item left closes it. The
// caller waits for those inside, and for nobody else: a worker that sleeps, or that the system has
// taken its core from, is not waited for unless it holds an item. That is what keeps a run from
// collapsing when other processes want the cores.
//
// Whoever waits, spins for a moment (the next run is often microseconds away) and then sleeps. A
// sleeping caller also frees its core for the very worker it waits for. Two threads that have been
// put on one core do not spin for each other.
//
// Left to itself, the system often wakes a worker on the core of its caller: the others are taken
// at that moment, by the thread that has asked the caller for its work and will sleep at once. So
// workers are kept off the core that their caller is on.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "placement.h"

namespace moefast {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the gap between two operations of a layer that MLX fills with its own, shorter than a
// time slice by far.
constexpr Clock::duration kPatience = std::chrono::microseconds(100);
// A worker that waits lets others have its core as often: most often that is the thread which has
// just been given what the run computed. Oftener, or the caller too, and a process that wants the
// cores takes twice its share of them.
constexpr Clock::duration kBetweenYields = std::chrono::microseconds(20);
constexpr Clock::duration kNever = Clock::duration::max();

// When the library is loaded, not at first use: the lock around a first use could itself be held at
// a fork().
std::atomic<uint32_t> forks{0};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // "yield" is over at once
#endif
}

// Threads made while one of these lives leave the program's signals to the program's own threads.
// What a thread does to itself (a crash, its share of a profile) still reaches it.
class NoSignals {
 public:
  NoSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF}) {
      sigdelset(&blocked, own);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &former_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &former_, nullptr); }

 private:
  sigset_t former_;
};

// The door: how many workers are inside, whether it is open, whether the pool ends, and the number
// of the run.
constexpr uint64_t kInside = 0xffffffff;
constexpr uint64_t kOpen = uint64_t{1} << 32;
constexpr uint64_t kEnd = uint64_t{1} << 33;
constexpr int kNumber = 34;

}  // namespace

uint32_t fork_count() {
  return forks.load(std::memory_order_relaxed);
}

// The workers of one process and all that they share with the caller.
class Pool::Crew {
 public:
  explicit Crew(int threads)
      : threads_(threads), patience_(threads <= usable_cores() ? kPatience : Clock::duration(0)) {}

  ~Crew() {
    {
      const std::lock_guard<std::mutex> lock(bedroom_);
      door_.fetch_or(kEnd);
    }
    morning_.notify_all();
    for (std::thread& worker : workers_) {
      worker.join();
    }
  }

  void run(int64_t count, Call call, void* task) {
    const std::lock_guard<std::mutex> lock(callers_);
    if (count == 1 || threads_ == 1) {
      for (int64_t item = 0; item < count; ++item) {
        call(task, item, item + 1 < count ? item + 1 : -1, 0);
      }
      return;
    }
    hire();
    call_ = call;
    task_ = task;
    count_ = count;
    core_ = core_here();
    spread();
    crowded_.store(false, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    unclaimed_.store(0, std::memory_order_relaxed);
    door_.store(((door_.load(std::memory_order_relaxed) >> kNumber) + 1) << kNumber | kOpen);
    wake(count - 1);
    work(0);
    door_.fetch_and(~kOpen);
    wait_until_empty();
    if (failed_.load(std::memory_order_relaxed)) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  void hire() {
    if (hired_) {
      return;
    }
    hired_ = true;
    const NoSignals quiet;
    try {
      workers_.reserve(threads_ - 1);
      while (static_cast<int>(workers_.size()) < threads_ - 1) {
        const int thread = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, thread] { serve(thread); });
      }
    } catch (const std::system_error&) {
      // The system gives no more threads. Fewer are slower, not wrong.
    }
  }

  // Only asks the system when the caller has come to another core, which costs microseconds.
  void spread() {
    if (core_ != avoided_ && patience_ != Clock::duration(0)) {
      avoided_ = core_;
      keep_off(core_, workers_);
    }
  }

  void serve(int thread) {
    uint64_t last = 0;  // number of the run that this worker was in
    bool patient = true;
    for (;;) {
      uint64_t door = wait_for_run(last, patient);
      if (door & kEnd) {
        return;
      }
      if (door_.compare_exchange_strong(door, door + 1)) {
        last = door >> kNumber;
        patient = core_ < 0 || core_here() != core_;
        if (!patient) {
          crowded_.store(true, std::memory_order_relaxed);
        }
        work(thread);
        leave();
      }
    }
  }

  // Items are claimed by counting up; what is claimed is done by the same thread.
  int64_t claim() {
    const int64_t item = unclaimed_.fetch_add(1, std::memory_order_relaxed);
    return item < count_ ? item : -1;
  }

  int64_t claim_ahead() {
    return unclaimed_.load(std::memory_order_relaxed) < count_ - (threads_ - 1) ? claim() : -1;
  }

  void work(int thread) {
    int64_t item = claim();
    while (item >= 0 && !failed_.load(std::memory_order_relaxed)) {
      const int64_t next = claim_ahead();
      try {
        call_(task_, item, next, thread);
      } catch (...) {
        if (!failed_.exchange(true)) {
          error_ = std::current_exception();
        }
        return;
      }
      item = next >= 0 ? next : claim();
    }
  }

  // -- doors and waiting. Sequentially consistent throughout: who goes to sleep says so and then
  // looks at the door once more; who changes the door looks for sleepers afterwards.

  // Calls up to `wanted` sleepers.
  void wake(int64_t wanted) {
    const int sleepers = asleep_.load();
    if (sleepers == 0) {
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(bedroom_);
    }  // who said so is asleep now
    if (wanted >= sleepers) {
      morning_.notify_all();
      return;
    }
    for (; wanted > 0; --wanted) {
      morning_.notify_one();
    }
  }

  // Returns the door, open for another run than `last` or at the end.
  uint64_t wait_for_run(uint64_t last, bool patient) {
    uint64_t door = 0;
    const auto called = [&] {
      door = door_.load();
      return (door & kEnd) || ((door & kOpen) && door >> kNumber != last);
    };
    if (!(patient ? spin(called, kBetweenYields) : called())) {
      std::unique_lock<std::mutex> lock(bedroom_);
      asleep_.fetch_add(1);
      morning_.wait(lock, called);
      asleep_.fetch_sub(1);
    }
    return door;
  }

  void leave() {
    door_.fetch_and(~kOpen);  // nothing is left to do
    const uint64_t before = door_.fetch_sub(1);
    if ((before & kInside) == 1 && caller_asleep_.load()) {
      {
        const std::lock_guard<std::mutex> lock(bedroom_);
      }
      all_out_.notify_one();
    }
  }

  void wait_until_empty() {
    const auto empty = [&] { return (door_.load() & kInside) == 0; };
    if (!(crowded_.load(std::memory_order_relaxed) ? empty() : spin(empty, kNever))) {
      std::unique_lock<std::mutex> lock(bedroom_);
      caller_asleep_.store(true);
      all_out_.wait(lock, empty);
      caller_asleep_.store(false);
    }
  }

  // Whether `done` comes true within the patience. By the clock: a pause takes from one to a
  // hundred nanoseconds, and a thread that lost its core meanwhile has waited long enough.
  template <class Done>
  bool spin(Done done, Clock::duration between_yields) const {
    if (done()) {
      return true;
    }
    if (patience_ == Clock::duration(0)) {
      return false;
    }
    const auto start = Clock::now();
    auto next = between_yields;
    for (;;) {
      relax();
      if (done()) {
        return true;
      }
      const auto waited = Clock::now() - start;
      if (waited >= patience_) {
        return false;
      }
      if (waited >= next) {
        next = waited + between_yields;
        std::this_thread::yield();
      }
    }
  }

  const int threads_;
  const Clock::duration patience_;  // 0: threads outnumber the cores, spinning would be in the way

  std::mutex callers_;  // held during a run
  bool hired_ = false;
  std::vector<std::thread> workers_;
  int avoided_ = -1;  // the core that workers are kept off

  // The job; written while the door is closed and nobody inside.
  Call call_ = nullptr;
  void* task_ = nullptr;
  int64_t count_ = 0;
  int core_ = -1;             // the caller's
  std::exception_ptr error_;  // of the thread that set failed_
  std::atomic<bool> failed_{false};
  std::atomic<bool> crowded_{false};  // a worker came in on the caller's core

  // Apart, so that claiming items does not slow down those who watch the door.
  alignas(128) std::atomic<int64_t> unclaimed_{0};
  alignas(128) std::atomic<uint64_t> door_{0};
  alignas(128) std::mutex bedroom_;
  std::condition_variable morning_;  // for workers
  std::condition_variable all_out_;  // for the caller
  std::atomic<int> asleep_{0};       // workers
  std::atomic<bool> caller_asleep_{false};
};

Pool::Pool(int threads) : threads_(std::max(threads, 1)) {}

Pool::~Pool() = default;

void Pool::run(int64_t count, Call call, void* task) {
  if (count > 0) {
    crew_.get(threads_).run(count, call, task);
  }
}

}  // namespace moefast
