# Toolchain: the C++ compiler in the Python package ziglang, which brings the headers and libraries of every
# target it knows. Set MOEFAST_ZIG to its path, and CMAKE_SYSTEM_NAME and CMAKE_SYSTEM_PROCESSOR.

set(MOEFAST_ZIG "" CACHE FILEPATH "The zig program of the package ziglang")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES MOEFAST_ZIG)
# CMake will not go without this one; nothing calls it.
set(CMAKE_INSTALL_NAME_TOOL "${MOEFAST_ZIG}")
# Nothing is linked to find out what the compiler can do: Zig would compile a whole standard library for it.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

if(CMAKE_SYSTEM_NAME STREQUAL "Darwin")
  set(moefast_target aarch64-macos)
else()
  set(moefast_target aarch64-linux-musl) # its programs are whole: an emulator needs no libraries beside them
endif()
set(CMAKE_CXX_COMPILER "${MOEFAST_ZIG}" c++ -target ${moefast_target})
# A compiler is one program to CMake, an archiver a rule.
set(CMAKE_CXX_ARCHIVE_CREATE "${MOEFAST_ZIG} ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "${MOEFAST_ZIG} ranlib <TARGET>")

# Zig has names of its own for what a CPU can do.
set(MOEFAST_NEON_FLAGS -mcpu=generic+v8_2a+dotprod+i8mm+fullfp16)
