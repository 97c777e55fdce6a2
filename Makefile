# From a fresh clone: `make demo` compresses a detector, `make test` runs every test. Both need Python 3.11
# and nothing else; PYTHON=/path/to/python3.11 names one that is not on the PATH.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python; do \
	"$$p" -c '$(IS_311)' 2>/dev/null && echo "$$p" && break; done)
endif
# Tests that are quick and start no Ray: what to run before every commit.
FAST := not slow and not integration and not chaos
# A real Ray wants the machine for itself; everything else runs side by side, a file in one process.
SIDE_BY_SIDE := -n auto --dist loadfile

.PHONY: help demo test check clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.installed ## install, then compress a small detector through a real Ray job on this machine
	@echo "demo: starting a local Ray, submitting jobs/compress.py demo, stopping it again"
	$(BIN)/python -m pbd_ray.cluster.demo

test: $(VENV)/.installed-dev lint ## install, lint, type-check, then run every test
	@echo "test: without Ray (unit, golden, and of chaos what needs none)"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not integration"
	@echo "test: on a real Ray"
	$(BIN)/python -m pytest -m integration

check: $(VENV)/.installed-dev lint ## install, lint, type-check, then run the fast tests: the one command before a commit
	@echo "check: the fast tests ($(FAST))"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "$(FAST)"

.PHONY: lint
lint: $(VENV)/.installed-dev
	@echo "lint: style (ruff), types (mypy), arrows between the packages (import-linter)"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again whenever pyproject.toml is newer than the stamp.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "install: pbd_ray and what it needs into $(VENV) (torch and Ray are large: minutes, 6 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "install: pbd_ray, what it needs and the test tools into $(VENV) (torch and Ray are large: minutes, 6 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null && "$(PYTHON)" -c '$(IS_311)' 2>/dev/null || { \
		echo "error: pbd_ray needs Python 3.11, and '$(or $(PYTHON),python3.11)' is not one: install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "venv: $(VENV) with $$("$(PYTHON)" --version)"
	"$(PYTHON)" -m venv $(VENV)
