#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace {

thread_local char message[512];

}  // namespace

namespace moefast {

int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return status;
}

}  // namespace moefast

extern "C" const char* moefast_error(void) {
  return message;
}
