// Which instruction sets this build has and this machine runs.
//
// isas_test [name]...: the instruction sets that must be there, no more and no fewer, best first.
// Tests of kernels go through all there are, and would pass without those that are missing.
#include "isas.h"

#include <cstdio>
#include <set>
#include <string>

#include "expect.h"

using namespace moefast;
using namespace moefast::testing;

int main(int count, char** arguments) {
  std::set<std::string> names;
  for (const Isa* isa : isas()) {
    std::printf("%s\n", isa->name);
    EXPECT(find_isa(isa->name) == isa);
    EXPECT(names.insert(isa->name).second);
  }
  EXPECT(find_isa("") == isas().front());
  EXPECT(isas().back() == isa_portable());
  EXPECT(find_isa("abacus") == nullptr);
  for (int i = 1; i < count; ++i) {
    if (names.count(arguments[i]) == 0) {
      std::printf("%s is missing\n", arguments[i]);
    }
    EXPECT(names.count(arguments[i]) == 1);
  }
  EXPECT(count == 1 || names.size() == static_cast<size_t>(count - 1));
  return verdict();
}
