# Everything runs from .venv, which `make venv` builds; python3.11 and make are all that a machine needs beforehand.

PYTHON ?= python3.11
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
REQUIREMENTS := requirements.txt requirements-convert.txt requirements-dev.txt
STAMP := $(VENV)/.installed
JAX_CACHE := $(CURDIR)/.cache/jax

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint bazel-test clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv with all pinned packages (run, conversion, tests); again only when a pin changes

# A .venv without a working pip is a creation that was interrupted: it is made anew.
$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is not a Python 3.11; install it (Debian: apt-get install python3.11 python3.11-venv)" \
	       "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet $(addprefix -r ,$(REQUIREMENTS))
	@touch $@

quickstart: venv ## all four distillations of the toy teacher, the student's model folder, ONNX, Hexagon: one report
	$(BIN)/python -m experiments.quickstart --workdir runs/quickstart

test: venv ## run the whole test suite (PYTEST_ARGS="-k report" narrows it, WORKERS=1 runs it in one process)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: venv ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tests find .venv by themselves (tools/python.bzl). Sandboxed, they may write to one folder of the tree, JAX's
# compilation cache: what `make test` compiled is not compiled again.
bazel-test: venv ## run the suite once more under Bazel, which holds every test to its declared dependencies
	@command -v bazel >/dev/null || { echo "error: 'bazel' not found; install it (Debian: apt-get install bazel-bootstrap)" >&2; exit 1; }
	@mkdir -p $(JAX_CACHE)
	bazel test //... --test_env=JAX_COMPILATION_CACHE_DIR=$(JAX_CACHE) --sandbox_writable_path=$(JAX_CACHE)

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
