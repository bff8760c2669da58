# Everything starts from `make venv`, which the other targets run by themselves.
#   PYTHON=python3.12   interpreter of a new .venv
#   ARGS="-k route -x"  extra arguments of pytest or of a benchmark

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# find, not $(wildcard), which does not descend into folders.
cpp_files = find csrc kernels -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.metal' \)
BUILT_FROM := $(shell find csrc -type f -not -path 'csrc/tests/*' -not -name '*.md')

.PHONY: help venv test test-all test-asan test-tsan lint format bench bench-ops wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create or update .venv with moefast, editable, and everything to develop it

# The stamp is written last, so an interrupted install starts again; an environment that has no
# working pip or too old a Python (a first try with the wrong PYTHON) is made anew. Built without isolation,
# against the very MLX that is installed here, and in a folder that is kept: edited files only.
$(STAMP): pyproject.toml CMakeLists.txt $(BUILT_FROM)
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	     || { echo "moefast needs Python 3.11 or newer: make venv PYTHON=python3.12" >&2; exit 1; }; \
	     $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	> $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --quiet cmake ninja --requirement $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation \
	  --config-settings=build-dir=build/editable --editable ".[cpu,dev]"
	@touch $@

test: $(STAMP)  ## run the test suite without the slow tests
	$(BIN)/python -m pytest $(ARGS)

test-all: $(STAMP)  ## run the test suite, slow tests included
	$(BIN)/python -m pytest -m "" $(ARGS)

# The kernels alone: neither Python nor MLX is built with sanitizers. Leaks are not looked for, Python has
# many; the C++ runtime is loaded early because the sanitizer looks for its exceptions there.
test-asan: $(STAMP)  ## run the C++ tests and the kernels' tests under the address sanitizer
	$(call sanitized,asan,address$(comma)undefined)
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan/csrc --output-on-failure --label-exclude speed
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest tests/test_kernels*.py --kernels "$$(echo build/asan/csrc/numpy/_kernels*.so)" $(ARGS)

test-tsan: $(STAMP)  ## run the thread pool's tests under the thread sanitizer
	$(call sanitized,tsan,thread) -DMOEFAST_PORTABLE=ON
	$(BIN)/cmake --build build/tsan --target pool_test
	$(NO_ASLR) build/tsan/csrc/tests/pool_test

comma := ,
# Where addresses are spread more widely than it knows, the thread sanitizer refuses to start.
NO_ASLR := $(shell command -v setarch >/dev/null && echo setarch -R)
sanitized = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=None \
	  -DMOEFAST_TESTS=ON -DMOEFAST_SANITIZE=$(2) -DPython_EXECUTABLE=$(abspath $(BIN)/python)

lint: $(STAMP)  ## check style and types: ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(cpp_files) -exec $(BIN)/clang-format --dry-run -Werror {} +

format: $(STAMP)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only --exit-zero
	$(BIN)/ruff format
	$(cpp_files) -exec $(BIN)/clang-format -i {} +

bench: $(STAMP)  ## tokens per second of whole models on this machine
	$(BIN)/python benchmarks/tokens.py $(ARGS)

bench-ops: $(STAMP)  ## time of each operation against the machine's limits
	$(BIN)/python -m pytest benchmarks/ops.py $(ARGS)

wheel: $(STAMP)  ## build the source distribution and the wheel into dist/
	$(BIN)/python -m build

clean:  ## remove build output and caches, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find benchmarks moefast tests -type d -name __pycache__ -prune -exec rm -rf {} +
