// What the plain test programs share: checks that count, cases with a name.
#ifndef MOEFAST_TESTS_EXPECT_H
#define MOEFAST_TESTS_EXPECT_H

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>

namespace moefast::testing {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline std::atomic<int> failures{0};

inline void expect(bool condition, const char* what, const char* file, int line) {
  if (!condition && ++failures <= 50) {
    std::printf("  %s:%d: %s\n", file, line, what);
  }
}

#define EXPECT(condition) moefast::testing::expect((condition), #condition, __FILE__, __LINE__)

// Runs a case and prints how it went; with `only`, just those whose name has it in it.
inline void run_case(const char* name, void (*body)(), const char* only) {
  if (only != nullptr && std::strstr(name, only) == nullptr) {
    return;
  }
  const int before = failures;
  const auto start = Clock::now();
  std::printf("%s\n", name);
  std::fflush(stdout);
  body();
  std::printf("  %s (%.2f s)\n", failures == before ? "ok" : "FAILED", seconds_since(start));
  std::fflush(stdout);
}

// The exit code of a test program.
inline int verdict() {
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}

}  // namespace moefast::testing

#endif
