# `make demo` runs the method on a small built-in model; `make test` checks the code. Each sets up .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share what is slow to set up, so they stay in one process; each process takes 2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo peers test test-all lint docs tables audit clean

help:  ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plots,recipes]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Without their dependencies: the comment of the extra `bench` in pyproject.toml says why.
$(VENV)/installed-peers: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps curvlinops-for-pytorch laplace-torch backpack-for-pytorch
	@touch $@

demo: $(VENV)/installed  ## Fine-tune the built-in model and compare all methods (a few minutes on 2 cores)
	$(BIN)/python -m recipes.qwen_obqa $(ARGS)

peers: $(VENV)/installed-peers  ## Install the libraries that `python -m recipes.benchmark` compares with
	@$(BIN)/python -c 'import curvlinops, laplace'

lint: $(VENV)/installed-dev  ## Ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Ruff, mypy and the quick tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint peers  ## The same with the slow tests
	$(PYTEST) $(ARGS)

docs: $(VENV)/installed-docs  ## Build the documentation into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

tables: $(VENV)/installed  ## Write the tables of methods, metrics, tasks and protocols into the pages of docs/
	$(BIN)/python -m docs.mkdocs_hooks

audit:  ## Compare the pinned versions with the databases of known vulnerabilities (needs a network)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean:  ## Remove the virtual environment and every cache
	rm -rf $(VENV) $(VENV)-audit .mypy_cache .pytest_cache .ruff_cache build *.egg-info
