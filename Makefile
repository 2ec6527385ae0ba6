# make demo   the whole walk on shipped text: prepare, train dense and MoE, eval, inspect (minutes)
# make test   lint, types, import contracts, tests, and the tests of plugins/ from the outside
# make test-long   the tests that take minutes each (20 kills of a run, for every router), one after the other
# Each does all set-up in .venv first; the second time there is nothing left to set up.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -q -n auto --maxprocesses 4 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(patsubst %/pyproject.toml,./%,$(wildcard plugins/*/pyproject.toml))
PLUGINS_HOME := $(VENV)/plugins

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-plugins lint format clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/moectl quickstart

test: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	@$(MAKE) --no-print-directory test-plugins

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long -rP tests

test-plugins: $(PLUGINS_HOME)
	PYTHONPATH=$(PLUGINS_HOME) $(BIN)/python -m pytest $(PYTEST_FLAGS) plugins

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Made anew only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moectl needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not make $(VENV): install Python's venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo 'setting up $(VENV): a few minutes the first time' >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

# As wheels, not editable: what is tested is what a user would install. In a folder of their own, so that
# moectl's own tests and runs meet no plug-in that nobody asked for.
$(PLUGINS_HOME): $(STAMP) $(wildcard plugins/*/pyproject.toml plugins/*/src/*.py)
	@rm -rf $@
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --target $@ $(PLUGINS)
	@touch $@
