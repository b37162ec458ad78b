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

.PHONY: venv demo lint types test test-all check constraints bench gpu docs clean
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

# Tests of marks $(1), with options $(2). Those that fork ranks of devices come first, in processes of their own: none
# forks once a backward pass has had a device. Those that start launchers, and so take ports and look at processes, come
# last and run one at a time. pytest ends with 5 where no test has the marks; tests/device is collected where "device" is
# the first word of the expression.
define run_tests
	$(call pytest,$(1),$(DEVICE_TESTS) and zero3,tests/device $(2) $(call workers,$(RANK_WORKERS)))
	$(call pytest,$(1),$(DEVICE_TESTS) and not zero3,tests/device $(2) $(call workers,$(RANK_WORKERS)))
	TRITON_INTERPRET=1 $(call pytest,$(1),$(KERNEL_TESTS),tests/kernels $(2) $(call workers,$(TEST_WORKERS)))
	$(call pytest,$(1),not ($(RANK_TESTS) or $(DEVICE_TESTS) or $(KERNEL_TESTS)),$(2) $(call workers,$(TEST_WORKERS)))
	$(call pytest,$(1),zero3 and not ($(LAUNCHER_TESTS) or $(DEVICE_TESTS)),$(2) $(call workers,$(RANK_WORKERS)))
	$(call pytest,$(1),($(LAUNCHER_TESTS)),$(2))
endef
pytest = $(BIN)/python -m pytest -m '$(2) and ($(1))' $(3) || test $$? = 5
workers = --numprocesses $(1) --dist worksteal

# every promise of the documentation at least once
test: venv
	$(call run_tests,not thorough,--hypothesis-profile quick)

# and all that is left, with more examples of every property
test-all: test
	$(call run_tests,thorough or hypothesis,--hypothesis-profile thorough)

check: lint types test-all

# keeps the versions that are installed; see CONTRIBUTING.md
constraints: venv
	(echo '# Versions that passed `make check` together. `make constraints` writes this file.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' | grep -vE '^(nvidia|cuda)') > .ci/constraints.txt

bench: venv
	$(BIN)/python -m tools.bench.mask_update --json
	$(BIN)/python -m tools.bench.train_step --json
	$(BIN)/python -m tools.bench.scale --json
	$(BIN)/python -m tools.bench.checkpoint --json
	$(BIN)/python -m tools.bench.pack --json
	$(BIN)/python -m tools.bench.prepare --json
	$(BIN)/python -m tools.bench.runtime --json
	$(BIN)/python -m tools.bench.decode --json

# ten minutes on a machine with a GPU; writes runs/gpu.json and runs/gpu.md. Some sections again: make gpu ONLY="bits train"
gpu: venv
	$(BIN)/python -m tools.gpu $(if $(ONLY),--only $(ONLY))

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file tools/docs/mkdocs.yml

clean:
	rm -rf $(VENV) build runs *.egg-info
