# What all of moefast's C++ is compiled with.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
# There are none, and Clang comes without the tool that would look for them.
set(CMAKE_CXX_SCAN_FOR_MODULES OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
# One module must not find the other's copy of a symbol.
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

# Which file is compiled with which options: read by tests/test_isa_leaks.py, and by editors.
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

if(MOEFAST_SANITIZE)
  # -g1: lines for the reports; more would take longer than the code.
  add_compile_options(
    -fsanitize=${MOEFAST_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
  add_link_options(-fsanitize=${MOEFAST_SANITIZE})
  # Indices into the standard library's containers, which are checked nowhere else.
  add_compile_definitions(_GLIBCXX_ASSERTIONS)
endif()
