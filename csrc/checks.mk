# What looks harder at the C++ sources than `make test` does. Part of ../Makefile; each target has a build
# folder of its own, which is kept: only what was edited is compiled again.

configure = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DMOEFAST_TESTS=ON
comma := ,
# Programs of one thread each, most of them: as many at once as there are cores.
CORES := $(shell getconf _NPROCESSORS_ONLN)

# -- sanitizers: of GCC. The kernels alone, neither Python nor MLX is built with them ------------------------

for_this_python = -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE=$(abspath $(BIN)/python)
test_kernels = $(BIN)/python -m pytest tests/test_kernels*.py --kernels "$$(echo build/$(1)/csrc/numpy/_kernels*.so)"
# The C++ runtime is loaded early because a sanitizer looks for its exceptions there.
preload = LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) $$($(CXX) -print-file-name=libstdc++.so)"
# Where addresses are spread more widely than it knows, the thread sanitizer refuses to start.
NO_ASLR := $(shell setarch -R true 2>/dev/null && echo setarch -R)

# Leaks are looked for in the C++ tests only: Python has many. What a sanitizer finds ends the process of pytest it is
# found in; pytest then names the test.
test-asan: $(STAMP)  ## run the C++ tests and the kernels' tests under ASan and UBSan
	$(call configure,asan) -DMOEFAST_SANITIZE=address$(comma)undefined $(for_this_python)
	$(BIN)/cmake --build build/asan --target moefast_tests _kernels
	$(BIN)/ctest --test-dir build/asan --no-tests=error --output-on-failure --label-exclude speed --parallel $(CORES)
	ASAN_OPTIONS=detect_leaks=0 $(call preload,asan) $(call test_kernels,asan) $(PARALLEL) $(ARGS)

# Portable code only: threads are the same for all instruction sets. (pytest captures what a sanitizer writes.)
# No fork() among threads, which the sanitizer's own runtime does not live through in Python; the pool's tests do fork.
test-tsan: $(STAMP)  ## run the thread pool's tests, and operations on it, under TSan
	$(call configure,tsan) -DMOEFAST_SANITIZE=thread -DMOEFAST_PORTABLE=ON $(for_this_python)
	$(BIN)/cmake --build build/tsan --target pool_test placement_test attention_test _kernels
	$(NO_ASLR) $(BIN)/ctest --test-dir build/tsan --no-tests=error --output-on-failure \
	  --tests-regex '^(pool|placement)_test$$' --repeat until-fail:10
	$(NO_ASLR) build/tsan/csrc/tests/attention_test chunks
	TSAN_OPTIONS=suppressions=$(CURDIR)/csrc/tests/tsan.supp $(call preload,tsan) \
	$(NO_ASLR) $(call test_kernels,tsan) --capture=no -k 'threads and not fork'

# -- ARM, from any machine ----------------------------------------------------------------------------------

# The compiler, from the extra "cross".
CROSS := $(VENV)/.cross
$(CROSS): $(STAMP)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cross"], sep="\n")' \
	> $(VENV)/cross-requires.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/cross-requires.txt
	@touch $@

cross = -DMOEFAST_BINDINGS=OFF -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/cmake/zig.cmake \
  -DMOEFAST_ZIG="$$($(BIN)/python -c 'import ziglang; print(*ziglang.__path__)')/zig" \
  -DCMAKE_SYSTEM_NAME=$(1) -DCMAKE_SYSTEM_PROCESSOR=$(2)

# What runs a program for 64-bit ARM Linux here: nothing is needed on such a machine.
ARM := $(filter Linux-aarch64,$(shell uname -s)-$(shell uname -m))
QEMU := $(if $(ARM),,$(shell command -v qemu-aarch64 || command -v qemu-aarch64-static))

test-neon: $(CROSS)  ## cross-compile the kernels for ARM (Linux, macOS); test them where QEMU is
	$(call configure,macos) $(call cross,Darwin,arm64)
	$(BIN)/cmake --build build/macos --target moefast_cpu
	$(call configure,neon) $(call cross,Linux,aarch64) \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=$(QEMU) '-DMOEFAST_TEST_ISAS=neon;portable'
	$(BIN)/cmake --build build/neon --target isa_tests
	@if [ -n "$(ARM)$(QEMU)" ]; then \
	  $(BIN)/ctest --test-dir build/neon --no-tests=error --output-on-failure --label-regex isa --parallel $(CORES); \
	else \
	  echo "test-neon: compiled, but NOT RUN: no qemu-aarch64 was found (Debian: apt install qemu-user)"; \
	fi
