# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# two test processes with one BLAS thread each beat one process with two
JOBS   ?= 2

# a Python with torch for the GPU; `make gpu` installs nothing, and says what is missing
GPU_PYTHON ?= python3

.PHONY: demo docs gpu test test-long test-all test-kernels lint format theory install clean
install: $(STAMP)

# torch first and pinned: an open range would resolve to a build with gigabytes of CUDA packages
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments demo

theory: $(STAMP)
	$(BIN)/python -m theory.fw_gap

gpu:
	$(GPU_PYTHON) -m experiments gpu $(GPU_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m long

# one run instead of two: the long tests fill the gaps
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m ""

test-kernels: $(STAMP)
	PYTHON=$(BIN)/python JOBS=$(JOBS) .ci/kernels

# -W: a warning fails the build, as an error in a code cell does; -E: all cells are run, on unchanged pages too
docs: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) PATH="$(abspath $(BIN)):$$PATH" \
		$(BIN)/python -m sphinx -q -E -W --keep-going -b html -j $(JOBS) docs docs/_build/html

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
