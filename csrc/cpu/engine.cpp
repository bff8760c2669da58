#include "engine.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

using moefast::fail;

extern "C" {

int moefast_engine_create(int threads, const char* isa, moefast_engine** engine) {
  if (engine == nullptr) {
    return fail(MOEFAST_BAD_VALUE, "[engine] engine must not be NULL, got NULL.");
  }
  *engine = nullptr;
  constexpr int kMost = 1024;
  if (threads > kMost) {
    return fail(MOEFAST_BAD_VALUE, "[engine] threads must be at most %d, got %d.", kMost, threads);
  }
  const char* name = isa == nullptr ? "" : isa;
  const moefast::Isa* found = moefast::find_isa(name);
  if (found == nullptr) {
    const char* names[16];
    const size_t count = std::min<size_t>(moefast::list_isas(names, 16), 16);
    std::string known;
    for (size_t i = 0; i < count; ++i) {
      known += (i ? ", " : "") + std::string(names[i]);
    }
    return fail(MOEFAST_BAD_VALUE, "[engine] isa must be one that runs here (%s), got '%s'.",
                known.c_str(), name);
  }
  try {
    *engine = new moefast_engine(threads > 0 ? threads : moefast::usable_cores(), *found);
  } catch (const std::exception& error) {
    return fail(MOEFAST_OUT_OF_MEMORY, "[engine] must start, got %s.", error.what());
  }
  return MOEFAST_OK;
}

void moefast_engine_destroy(moefast_engine* engine) {
  delete engine;
}

int moefast_engine_threads(const moefast_engine* engine) {
  return engine->pool.threads();
}

const char* moefast_engine_isa(const moefast_engine* engine) {
  return engine->isa.name;
}

size_t moefast_engine_scratch(const moefast_engine* engine) {
  return engine->scratch.held();
}

int moefast_usable_cores(void) {
  return moefast::usable_cores();
}

size_t moefast_isas(const char** names, size_t capacity) {
  return moefast::list_isas(names, capacity);
}

}  // extern "C"
