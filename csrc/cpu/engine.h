// What every operation runs on: an instruction set, a pool of threads, scratch memory.
#ifndef MOEFAST_CPU_ENGINE_H
#define MOEFAST_CPU_ENGINE_H

#include <mutex>
#include <new>
#include <stdexcept>

#include "error.h"
#include "isa.h"
#include "per_process.h"
#include "pool.h"
#include "scratch.h"

struct moefast_engine {
  moefast_engine(int threads, const moefast::Isa& instructions)
      : isa(instructions), pool(threads) {}

  const moefast::Isa& isa;
  moefast::Pool pool;
  moefast::Scratch scratch;
  uint32_t scratch_forks = moefast::fork_count();  // fork()s before scratch was made
  moefast::PerProcess<std::mutex> busy;            // held by the operation that runs
};

namespace moefast {

// Breaks off an operation whose arguments break a rule.
struct BadValue : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs an operation alone on the engine and turns what it throws into a status.
template <class Operation>
int run_on(moefast_engine* engine, const char* name, Operation&& operation) {
  if (engine == nullptr) {
    return fail(MOEFAST_BAD_VALUE, "[%s] engine must not be NULL, got NULL.", name);
  }
  const std::lock_guard<std::mutex> lock(engine->busy.get());
  if (engine->scratch_forks != fork_count()) {
    // A forked child may have got it in the middle of a change. What it held is the parent's.
    new (&engine->scratch) Scratch();
    engine->scratch_forks = fork_count();
  }
  int status = MOEFAST_OK;
  try {
    operation(*engine);
  } catch (const BadValue& error) {
    status = fail(MOEFAST_BAD_VALUE, "[%s] %s", name, error.what());
  } catch (const std::bad_alloc&) {
    status = fail(MOEFAST_OUT_OF_MEMORY, "[%s] scratch memory must be available, got none.", name);
  } catch (const std::exception& error) {
    status = fail(MOEFAST_BAD_VALUE, "[%s] must run through, got %s.", name, error.what());
  }
  engine->scratch.reset();
  return status;
}

}  // namespace moefast

#endif
