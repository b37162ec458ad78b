# make demo and make test work on a fresh clone with Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the set of versions that CI tests; without one (make venv CONSTRAINTS=), the newest of the ranges in pyproject.toml
CONSTRAINTS ?= .ci/constraints.txt
# processes that run the unit tests, each of up to 8 GiB
TEST_WORKERS ?= 2
# processes that run the tests which fork ranks: two at a time leave fewer cores idle, and no port is shared
RANK_WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# every process of the tests, and every rank that they start, would compile the tests and the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv reinstall demo lint types test test-all test-newest check constraints bench gpu docs clean
.NOTPARALLEL:

venv: $(STAMP)

# the stamp names the constraints that were installed: other ones are installed over them
REINSTALL := $(shell test ! -f $(STAMP) || test "$$(cat $(STAMP))" = '$(CONSTRAINTS)' || echo reinstall)

$(STAMP): pyproject.toml $(CONSTRAINTS) $(REINSTALL)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pst-ds needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  $(if $(CONSTRAINTS),--constraint=$(CONSTRAINTS),--upgrade --upgrade-strategy=eager)
	echo '$(CONSTRAINTS)' > $@

demo: venv
	$(BIN)/python -m tools.demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools.lint_prose

types: venv
	$(BIN)/mypy

RUN_TESTS = $(BIN)/python -m tools.run_tests --unit-workers $(TEST_WORKERS) --rank-workers $(RANK_WORKERS) \
  $(if $(ONLY),--only $(ONLY))

# every promise of the documentation at least once, in six stages. Some again: make test ONLY="kernels ranks"
test: venv
	$(RUN_TESTS) --scope quick

# all tests, with more examples of every property
test-all: venv
	$(RUN_TESTS) --scope all

# the tests that depend most on other packages, with the newest versions; leaves .venv unchanged
test-newest: venv
	$(BIN)/python -m tools.newest_versions

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
	rm -rf $(VENV) .venv-newest build runs *.egg-info
