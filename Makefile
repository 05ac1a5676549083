# Each goal does its own set-up in .venv; a second call finds a stamp there and starts at once.
#
#   make train                        LeNet-5 on MNIST: gets the data if need be, then trains
#   make train ARGS="--head fc3"      options of `ezo train` (see `.venv/bin/ezo train --help`)
#   make test  ARGS="-k noise"        options of pytest
#
# PIP_ARGS goes to every `pip install`, for example to choose another build of torch.

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
# Processes of the tests, a GiB or two each: one a core, up to 8. Each has one thread: threads that share a core with another
# process mostly wait for each other.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: train test bench mutants lint clean

train: .venv/.train-ready
	$(BIN)/ezo train $(ARGS)

test: .venv/.dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

bench: .venv/.dev-ready
	$(BIN)/python -m bench $(ARGS)

mutants: .venv/.dev-ready
	$(BIN)/python tools/mutants.py $(ARGS)

lint: .venv/.dev-ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first and by itself: named in another package's requirements, a resolver may choose another build of it.
.venv/.torch-ready: constraints.txt | $(BIN)/python
	$(PIP) torch
	@touch $@

# What training needs: no test tools, no triton (a CPU has no use for it; a CUDA build of torch brings its own).
.venv/.train-ready: pyproject.toml .venv/.torch-ready
	$(PIP) --editable ".[digits,plot]"
	@touch $@

.venv/.dev-ready: pyproject.toml .venv/.torch-ready
	$(PIP) --editable ".[dev]"
	@touch $@ .venv/.train-ready
