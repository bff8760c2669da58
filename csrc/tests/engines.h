// Engines for tests of whole operations.
#ifndef MOEFAST_TESTS_ENGINES_H
#define MOEFAST_TESTS_ENGINES_H

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "expect.h"
#include "isas.h"

namespace moefast::testing {

// An engine for each instruction set and number of threads, made once.
inline moefast_engine* engine(const char* isa, int threads) {
  struct Destroy {
    void operator()(moefast_engine* engine) const { moefast_engine_destroy(engine); }
  };
  static std::map<std::pair<std::string, int>, std::unique_ptr<moefast_engine, Destroy>> made;
  auto& kept = made[{isa, threads}];
  if (kept == nullptr) {
    moefast_engine* created = nullptr;
    EXPECT(moefast_engine_create(threads, isa, &created) == MOEFAST_OK);
    kept.reset(created);
  }
  return kept.get();
}

}  // namespace moefast::testing

#endif
