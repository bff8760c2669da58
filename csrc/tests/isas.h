// The instruction sets that a test goes through.
#ifndef MOEFAST_TESTS_ISAS_H
#define MOEFAST_TESTS_ISAS_H

#include <cstring>
#include <vector>

#include "isa.h"

namespace moefast::testing {

// All that this build has and this machine runs: best first, portable last.
inline std::vector<const Isa*> isas() {
  const char* names[8];
  const size_t count = list_isas(names, 8);
  std::vector<const Isa*> found;
  for (size_t i = 0; i < count; ++i) {
    found.push_back(find_isa(names[i]));
  }
  return found;
}

// Whether what an instruction set compiles of generic/ has vectors as wide as portable's, and
// multiply-adds where portable has them: then the same bits must come out of both. On ARM they do;
// x86's newer sets have wider vectors than the oldest, which adds up in another order.
inline bool computes_like_portable(const Isa& isa) {
  return std::strcmp(isa.name, "neon") == 0;
}

}  // namespace moefast::testing

#endif
