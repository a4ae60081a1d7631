# `make demo` and `make test` do all the set-up that they need, once: Python's virtual environment in .venv, torch,
# the package. Nothing outside this folder is touched but the caches of pip and of raise-env.

VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# The first that is new enough; `make PYTHON=/path/to/python demo` takes another.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$name -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done)

# Two workers on two cores: more threads than that only wait for each other. By file, so that what the tests of one
# file share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
# Left out of `make check`: what runs whole commands, examples and algorithms.
COMMANDS := test_cli test_runs test_examples test_sb3 test_guide test_benchmark test_estimate test_evaluate test_model_card

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest coverage mutants check bench-speed soak api lint ruff ruff-format mypy

help:  ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.package  ## Learn a selector on the embedded task and show what it gains (a few minutes)
	$(BIN)/raise-env demo

test: $(VENV)/.dev  ## Run the tests (at most ten minutes on two cores)
	$(PYTEST)

test-all: $(VENV)/.dev  ## Run the slow tests too
	$(PYTEST) -m "not gpu and not network"

coverage: $(VENV)/.dev  ## Run the tests and tell which lines and branches they never reach
	$(PYTEST) --cov --cov-report=term

mutants: $(VENV)/.dev  ## Change sources one place at a time, and see which changes no test notices (an hour)
	@$(PIP) install --quiet -c constraints.txt --editable ".[mutants]"
	$(BIN)/python tests/mutants.py

# Warnings that older versions of others give each other are not ours to mend: they are no errors here.
test-lowest: $(VENV)/.torch  ## Run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(BIN)/python -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt --editable ".[test]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -W default

check: lint  ## Lint, check types and run the fast tests (about a minute)
	$(PYTEST) -m "not slow and not real and not gpu and not network" $(COMMANDS:%=--ignore=tests/%.py)

bench-speed: $(VENV)/.package  ## Measure speed and memory, and write docs/results/speed.md (ten minutes)
	$(BIN)/python benchmarks/speed.py

soak: $(VENV)/.package  ## Run 5,000 episodes, look at memory, and write docs/results/soak.md (three quarters of an hour)
	$(BIN)/python benchmarks/soak.py

api: $(VENV)/.dev  ## Write docs/api.md, the list of public names
	$(BIN)/python tests/api_page.py

lint: ruff ruff-format mypy  ## Check style, form and types

ruff: $(VENV)/.dev
	$(BIN)/ruff check .

ruff-format: $(VENV)/.dev
	$(BIN)/ruff format --check .

mypy: $(VENV)/.dev
	$(BIN)/mypy

# Set-up. Each stamp file stands for something that is installed; it is made anew when what it depends on changes.

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "raise-env needs Python 3.11 or newer; found none. Name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "raise-env needs Python 3.11 or newer; $(PYTHON) is older, or missing." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing: install it (Debian: python3-venv)." >&2; exit 1; }
	@touch $@

# Torch comes first and by its exact version: so pip takes the CPU build where it is given one. A bare `torch` would
# be the newest, and on Linux that pulls gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt $(VENV)/.venv
	@echo "Installing torch: about 200 MB for the CPU build, a minute or two"
	@$(PIP) install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.torch
	@echo "Installing raise-env and what it needs, a minute or two"
	@$(PIP) install --quiet -c constraints.txt --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "Installing raise-env, what it needs, and the tools for tests and lint, a minute or two"
	@$(PIP) install --quiet -c constraints.txt --editable ".[dev]"
	@touch $(VENV)/.package $@
