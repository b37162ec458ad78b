# make demo and make test work on a fresh clone with Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# versions to install, such as .ci/constraints.txt; without it, the newest of the ranges in pyproject.toml
CONSTRAINTS ?=
# processes that run the unit tests, each of up to 8 GiB
TEST_WORKERS ?= 2
# processes that run the tests which fork ranks: two at a time leave fewer cores idle, and no port is shared
RANK_WORKERS ?= 2
LAUNCHER_TESTS := launcher or cluster
RANK_TESTS := zero3 or $(LAUNCHER_TESTS)
DEVICE_TESTS := device
KERNEL_TESTS := interpreted
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# every process of the tests, and every rank that they start, would compile the tests and the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv demo lint types test test-unit check constraints bench gpu docs clean
.NOTPARALLEL:

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pst-ds needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint=,$(CONSTRAINTS)) --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python -m tools.demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools.lint_prose

types: venv
	$(BIN)/mypy

# after the others; those that start launchers, and so take ports and look at processes, run one at a time
test: test-unit
	$(BIN)/python -m pytest -m 'zero3 and not ($(LAUNCHER_TESTS))' --numprocesses $(RANK_WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m '$(LAUNCHER_TESTS)'

# tests that fork ranks of devices first, in processes of their own: none forks once a backward pass has had a device
test-unit: venv
	$(BIN)/python -m pytest -m '$(DEVICE_TESTS) and zero3' tests/device --numprocesses $(RANK_WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m '$(DEVICE_TESTS) and not zero3' tests/device --numprocesses $(RANK_WORKERS) --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m '$(KERNEL_TESTS)' tests/kernels --numprocesses $(TEST_WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m 'not ($(RANK_TESTS) or $(DEVICE_TESTS) or $(KERNEL_TESTS))' --numprocesses $(TEST_WORKERS) --dist worksteal

check: lint types test

# keeps the versions that are installed; see CONTRIBUTING.md
constraints: venv
	(echo '# Versions that passed `make check` together. `make constraints` writes this file.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' | grep -vE '^(nvidia|cuda)') > .ci/constraints.txt

bench: venv
	$(BIN)/python -m tools.bench.step
	$(BIN)/python -m tools.bench.mask_update --json
	$(BIN)/python -m tools.bench.train_step --json
	$(BIN)/python -m tools.bench.scale --json
	$(BIN)/python -m tools.bench.checkpoint --json
	$(BIN)/python -m tools.bench.pack --json
	$(BIN)/python -m tools.bench.prepare --json
	$(BIN)/python -m tools.bench.runtime --json
	$(BIN)/python -m tools.bench.decode --json

# ten minutes on a machine with a GPU; writes runs/gpu.json and runs/gpu.md
gpu: venv
	$(BIN)/python -m tools.gpu

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file tools/docs/mkdocs.yml

clean:
	rm -rf $(VENV) build runs *.egg-info
