// Run mode: the threadgroups of a launch spread over OS threads, in the caller's process.
//
// A kernel that faults or runs too long is left from a signal handler: it owns nothing that would
// have to be given back, so its OS thread continues in the scheduler as if the fiber had stopped
// there.
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "schedule.h"

namespace emulator {
namespace {

constexpr int kStopSignal = SIGURG;  // ignored by default: one that arrives late does no harm
constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

struct Run {
  const Launch* launch;
  Outcome outcome;
  uint64_t next, count;  // threadgroups
  uint32_t groups[3];
  uint32_t active;  // OS threads still at work
  pthread_mutex_t lock;
  pthread_cond_t finished;
};

thread_local Worker* here;
struct sigaction former[sizeof kFaults / sizeof *kFaults];

void on_signal(int signal, siginfo_t* info, void*) {
  Worker* worker = here;
  if (!worker || !worker->running) {
    if (signal == kStopSignal)
      return;
    // Not ours: as if we had never been there.
    for (size_t i = 0; i < sizeof kFaults / sizeof *kFaults; i++)
      if (kFaults[i] == signal)
        sigaction(signal, &former[i], nullptr);
    return;
  }
  Outcome& outcome = *worker->outcome;
  uint32_t expected = kFinished;
  // The first of several OS threads to fail tells why.
  if (__atomic_compare_exchange_n(&outcome.status, &expected, kTimeLimit, false, __ATOMIC_SEQ_CST,
                                  __ATOMIC_SEQ_CST)) {
    tell_fault(*worker, signal, info->si_addr, outcome);
    if (signal == kStopSignal)
      outcome.status = kTimeLimit;
  }
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  abandon(*worker);
}

void install_handlers() {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < sizeof kFaults / sizeof *kFaults; i++) {
    struct sigaction current;
    sigaction(kFaults[i], nullptr, &current);
    if (current.sa_sigaction == on_signal)
      continue;
    sigaction(kFaults[i], &action, &former[i]);
  }
  sigaction(kStopSignal, &action, nullptr);
}

void* work(void* argument) {
  Run& run = *(Run*)argument;
  Worker* worker = take_worker();
  stack_t former_stack = {};
  if (worker) {
    // Faults are handled on a stack of their own: the fiber's may be full.
    static thread_local char alternate[65536];
    stack_t alternate_stack = {};
    alternate_stack.ss_sp = alternate;
    alternate_stack.ss_size = sizeof alternate;
    sigaltstack(&alternate_stack, &former_stack);
    here = worker;
    begin_launch(*worker, *run.launch, nullptr, &run.outcome);
    while (__atomic_load_n(&run.outcome.status, __ATOMIC_RELAXED) == kFinished) {
      uint64_t i = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED);
      if (i >= run.count)
        break;
      uint32_t x = (uint32_t)(i % run.groups[0]);
      uint32_t y = (uint32_t)(i / run.groups[0] % run.groups[1]);
      run_threadgroup(*worker, x, y, (uint32_t)(i / run.groups[0] / run.groups[1]));
    }
    here = nullptr;
  }
  pthread_mutex_lock(&run.lock);
  if (worker) {
    auto* sum = (uint64_t*)&run.outcome.counts;
    auto* mine = (uint64_t*)&worker->counts;
    for (size_t i = 0; i < sizeof(Counts) / sizeof *sum; i++)
      sum[i] += mine[i];
    release_worker(worker);
    former_stack.ss_flags = SS_DISABLE;
    sigaltstack(&former_stack, nullptr);
  }
  run.active--;
  pthread_cond_signal(&run.finished);
  pthread_mutex_unlock(&run.lock);
  return nullptr;
}

timespec after(double seconds) {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  uint64_t ns = (uint64_t)t.tv_nsec + (uint64_t)(seconds * 1e9);
  t.tv_sec += (time_t)(ns / 1000000000);
  t.tv_nsec = (long)(ns % 1000000000);
  return t;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

// Runs a launch; what became of it is in `outcome`. Returns 0, or -1 if no OS thread could be
// started.
MSL_EXPORT int msl_run(const Launch* launch, Outcome* outcome) {
  install_handlers();
  Run run = {};
  run.launch = launch;
  run.count = 1;
  for (int i = 0; i < 3; i++) {
    run.groups[i] = (launch->grid[i] + launch->threadgroup[i] - 1) / launch->threadgroup[i];
    run.count *= run.groups[i];
  }
  pthread_mutex_init(&run.lock, nullptr);
  pthread_cond_init(&run.finished, nullptr);
  uint32_t wanted = launch->os_threads < run.count ? launch->os_threads : (uint32_t)run.count;
  pthread_t threads[256];
  uint32_t started = 0;
  pthread_mutex_lock(&run.lock);
  while (started < wanted && started < 256 &&
         pthread_create(&threads[started], nullptr, work, &run) == 0) {
    run.active++;
    started++;
  }
  timespec deadline = after(launch->seconds);
  while (run.active) {
    if (pthread_cond_timedwait(&run.finished, &run.lock, &deadline) == 0)
      continue;
    // Each thread reports the limit itself; asked again in case it was between two threadgroups.
    for (uint32_t i = 0; i < started; i++)
      pthread_kill(threads[i], kStopSignal);
    deadline = after(0.01);
  }
  pthread_mutex_unlock(&run.lock);
  for (uint32_t i = 0; i < started; i++)
    pthread_join(threads[i], nullptr);
  *outcome = run.outcome;
  return started ? 0 : -1;
}

// For abi.py, which writes the same structs down once more.
MSL_EXPORT uint32_t msl_size_of(uint32_t which) {
  const uint32_t sizes[] = {sizeof(Launch), sizeof(Outcome), sizeof(Finding)};
  return sizes[which];
}
