# make demo and make test work on a fresh clone with Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test test-unit check bench docs clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pst-ds needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python -m tools.demo

test: venv
	$(BIN)/python -m pytest

test-unit: venv
	$(BIN)/python -m pytest -m 'not zero3 and not launcher and not gpu'

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: venv
	$(BIN)/python -m tools.bench.step
	$(BIN)/python -m tools.bench.mask_update --json
	$(BIN)/python -m tools.bench.train_step --json
	$(BIN)/python -m tools.bench.scale --json
	$(BIN)/python -m tools.bench.checkpoint --json
	$(BIN)/python -m tools.bench.pack --json
	$(BIN)/python -m tools.bench.runtime --json
	$(BIN)/python -m tools.bench.decode --json

docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file tools/docs/mkdocs.yml

clean:
	rm -rf $(VENV) build runs *.egg-info
