// A pool of threads that runs numbered pieces of work.
#ifndef MOEFAST_CPU_POOL_H
#define MOEFAST_CPU_POOL_H

#include <cstdint>
#include <type_traits>

#include "cores.h"
#include "per_process.h"

namespace moefast {

class Pool {
 public:
  // `threads` (at least 1) includes the caller of run(): threads - 1 are created, at the first
  // run() that needs them, and again in the child after a fork().
  explicit Pool(int threads);
  // No run() may be under way.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls task(item, next, thread) for every 0 <= item < count and returns when all are done.
  // Each thread takes items in ascending order, one at a time and one ahead: `next` is the item
  // that the same thread will be given afterwards, so that it can fetch its memory, or -1 where
  // that is not known. The last items are not handed out ahead: no thread holds on to one that
  // another could begin. 0 <= thread < threads(): no two calls that run at once have the same.
  //
  // An exception thrown by a task is rethrown here once all threads are out; items not begun by
  // then are dropped. One run at a time: callers on other threads wait. Not reentrant, and a task
  // must not fork().
  template <class Task>
  void run(int64_t count, Task&& task) {
    using Bare = std::remove_reference_t<Task>;
    run(
        count,
        [](void* self, int64_t item, int64_t next, int thread) {
          (*static_cast<Bare*>(self))(item, next, thread);
        },
        const_cast<void*>(static_cast<const void*>(&task)));
  }

 private:
  using Call = void (*)(void* task, int64_t item, int64_t next, int thread);
  class Crew;

  void run(int64_t count, Call call, void* task);

  const int threads_;
  PerProcess<Crew> crew_;
};

}  // namespace moefast

#endif
