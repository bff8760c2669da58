# Everything starts from `make venv`, which the other targets run by themselves.
#   PYTHON=python3.12   interpreter of a new .venv
#   ARGS="-k route -x"  extra arguments of pytest or of a benchmark

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# find, not $(wildcard), which does not descend into folders.
cpp_files = find csrc kernels moefast/emulator -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.metal' \)
BUILT_FROM := $(shell find csrc -type f -not -path 'csrc/tests/*' -not -name '*.md' -not -name '*.mk')

.PHONY: help venv test test-all test-asan test-tsan test-neon oracle lint format bench bench-ops wheel clean

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
	  --config-settings=build-dir=build/editable --config-settings=cmake.define.MOEFAST_TESTS=ON \
	  --editable ".[cpu,dev]"
	@touch $@

# A process for each usable core (one: ARGS="-n 0"). Not in pyproject.toml: `pytest tests/test_x.py` is one process.
# Tests next to each other mostly keep to one process, which builds what their module shares. No --dist loadgroup:
# under pytest 9.2, pytest-xdist 3.8 takes no notice of its marks. The limit of a test is far above those of the programs
# that tests start: one that strikes while pytest writes the report of a failure is an internal error, which ends the run.
PARALLEL := -n logical --dist worksteal --timeout 300

test: $(STAMP)  ## run the test suite without the slow tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(STAMP)  ## run the test suite, slow tests included
	$(BIN)/python -m pytest -m "" $(PARALLEL) $(ARGS)

include csrc/checks.mk  # test-asan, test-tsan, test-neon

# Not installed: the wheel is for another system. Its kernels are what MLX's developers compiled with Apple's
# compiler; tests that compare the emulator with them skip without it. Fetched again when MLX is another.
oracle: $(STAMP)  ## fetch Apple-compiled kernels: the macOS wheel of the installed MLX (45 MB)
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("mlx"))'); \
	if [ ! -f build/oracle/mlx/lib/mlx.metallib ] || [ ! -d build/oracle/mlx_metal-$$version.dist-info ]; then \
	  rm -rf build/oracle && mkdir -p build/oracle && \
	  $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --platform macosx_14_0_arm64 \
	    --dest build/oracle "mlx-metal==$$version" && \
	  $(BIN)/python -m zipfile --extract build/oracle/mlx_metal-*.whl build/oracle && \
	  rm build/oracle/mlx_metal-*.whl; \
	fi

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
