// Check mode's process: child LIBRARY REQUEST. The request (child.py) holds the launch and the
// buffers, which are mapped from the file, so that what the kernel writes is there when the process
// has ended; the results follow.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "schedule.h"

namespace emulator {
namespace {

struct BufferRequest {
  uint64_t file_offset;  // a multiple of the page size
  uint64_t bytes;
  int32_t index;  // [[buffer(index)]]
  uint32_t writable, initialised, reserved;
};

// At the start of the file.
struct Request {
  Launch launch;
  uint32_t buffer_count, reserved;
  BufferRequest buffers[kBuffers];
  // Results.
  Outcome outcome;
  BufferCounts counts[kBuffers];
  uint64_t threadgroup_loaded, threadgroup_stored, atomics;
  uint32_t finding_count, completed;
  Finding findings[sizeof Check::findings / sizeof(Finding)];
};

Request* request;

void store_results() {
  for (uint32_t i = 0; i < request->buffer_count; i++)
    request->counts[i] = check.buffers[i].counts;
  request->threadgroup_loaded = check.threadgroup_loaded;
  request->threadgroup_stored = check.threadgroup_stored;
  request->atomics = check.atomics;
  request->outcome.counts = check.worker->counts;
  request->finding_count = check.finding_count;
  memcpy(request->findings, check.findings, sizeof check.findings);
  request->completed = 1;
}

void on_fault(int signal, siginfo_t* info, void*) {
  Outcome& outcome = request->outcome;
  if (check.worker && check.worker->running) {
    tell_fault(*check.worker, signal, info->si_addr, outcome);
    store_results();
  } else {
    outcome.status = kFault;
    outcome.detail = (uint64_t)signal;
    outcome.address = (uint64_t)info->si_addr;
  }
  _exit(3);
}

void catch_faults() {
  static char stack[65536];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  for (int signal : faults)
    sigaction(signal, &action, nullptr);
}

int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 2;
}

int run(const char* library, const char* file) {
  int descriptor = ::open(file, O_RDWR);
  if (descriptor < 0)
    return fail("cannot open the request");
  request =
      (Request*)mmap(nullptr, sizeof(Request), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (request == MAP_FAILED)
    return fail("cannot map the request");
  void* loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!loaded)
    return fail(dlerror());
  Launch& launch = request->launch;
  launch.entry = (uint64_t)dlsym(loaded, "msl_entry");
  if (!check.open(request->buffer_count))
    return fail("no memory");
  if (auto* count = (uint64_t*)dlsym(loaded, "msl_constant_count")) {
    check.constant_count = *count;
    check.constants = (uint64_t*)dlsym(loaded, "msl_constants");
  }
  static void* arguments[kArguments];
  for (uint32_t i = 0; i < request->buffer_count; i++) {
    const BufferRequest& b = request->buffers[i];
    check.bind(i, b.bytes, b.index, b.writable, b.initialised);
    arguments[b.index] = check.place(i);
    if (!b.bytes)
      continue;
    void* p = mmap(check.place(i), b.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                   descriptor, (off_t)b.file_offset);
    if (p == MAP_FAILED)
      return fail("cannot map a buffer");
  }
  launch.arguments = (uint64_t)arguments;
  catch_faults();

  Worker& worker = *check.worker;
  Outcome& outcome = request->outcome;
  outcome = {};
  begin_launch(worker, launch, &check, &outcome);
  uint32_t groups[3];
  uint64_t count = 1;
  for (int i = 0; i < 3; i++) {
    groups[i] = (launch.grid[i] + launch.threadgroup[i] - 1) / launch.threadgroup[i];
    count *= groups[i];
  }
  // In a shuffled launch, a permutation of the threadgroups that needs no memory: i -> (a * i + b)
  // mod count.
  uint64_t a = 1, b = 0;
  if (launch.shuffle && count > 1) {
    b = worker.random.below((uint32_t)count);
    auto common = [](uint64_t x, uint64_t y) {
      while (y) {
        uint64_t r = x % y;
        x = y;
        y = r;
      }
      return x;
    };
    do
      a = 1 + worker.random.below((uint32_t)count - 1);
    while (common(a, count) != 1);
  }
  for (uint64_t i = 0; i < count && outcome.status == kFinished; i++) {
    uint64_t g = (uint64_t)(((unsigned __int128)a * i + b) % count);
    run_threadgroup(worker, (uint32_t)(g % groups[0]), (uint32_t)(g / groups[0] % groups[1]),
                    (uint32_t)(g / groups[0] / groups[1]));
  }
  store_results();
  return 0;
}

}  // namespace
}  // namespace emulator

int main(int count, char** arguments) {
  if (count != 3)
    return emulator::fail("usage: child LIBRARY REQUEST");
  return emulator::run(arguments[1], arguments[2]);
}
