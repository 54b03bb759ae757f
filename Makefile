# Each target needs only Python 3.11+ and make. It builds .venv if it is missing or outdated.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Tests mostly wait: for servers, timers and processes. Four workers keep two cores busy.
WORKERS ?= 4

BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.stamp
PIP   := $(BIN)/python -m pip -qq --disable-pip-version-check

# nats-server is installed as a wheel. Tests find it on the PATH, like redis-server and memcached.
export PATH := $(BIN):$(PATH)
# Tests start hundreds of interpreters. With this variable, each would compile every module again.
unexport PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test fuzz check bench path soak faults docs format venv servers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 selects the interpreter, ARGS='-k lease' adds arguments, WORKERS=0 runs tests in one process"

demo: $(STAMP)-demo ## run a cache with hits, misses and events in the terminal
	@$(BIN)/python examples/demo.py $(ARGS)

demo-cluster: $(STAMP)-dev ## run NATS, Redis, two workers and an application; kill one worker
	@$(BIN)/python -m examples.demo_cluster $(ARGS)

test: $(STAMP)-dev servers ## run the test suite
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

fuzz: $(STAMP)-dev ## test a million random and mutated payloads and message bodies
	@CACHEBUS_FUZZ=1000000 $(BIN)/python -m pytest tests/payload/test_fuzz.py tests/bus/codec/test_fuzz.py --timeout 0 $(ARGS)

check: $(STAMP)-dev ## run the linter, the formatter check and the type checkers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(BIN)/python -m tests.house.words

bench: $(STAMP)-bench servers ## benchmark cachebus against other libraries
	@$(BIN)/python -m benchmarks $(ARGS)

path: $(STAMP)-dev servers ## count the calls of an operation; ARGS='redis-hit' prints its path
	@$(BIN)/python -m benchmarks.path $(ARGS)

faults: $(STAMP)-dev servers ## inject faults between a cache and Redis, and write docs/reliability.md
	@$(BIN)/python -m tests.faults $(ARGS)

soak: $(STAMP)-dev ## simulate a million seeds; ARGS='2000001 --seeds 50000' selects others
	@$(BIN)/python -m tests.loading.simulation $(or $(ARGS),1 --seeds 1000000)

docs: $(STAMP)-dev ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)
	@echo "site/index.html"

format: $(STAMP)-dev ## fix lint and format with ruff
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

venv: $(STAMP)-dev ## build .venv with all development tools
	@echo "source $(VENV)/bin/activate"

servers:
	@sh tests/install-servers.sh

clean: ## remove .venv, caches and build results
	@rm -rf $(VENV) build dist site .coverage .coverage.* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find cachebus tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp records the last successful install, so that a second run does not call pip.
$(STAMP)-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cachebus needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, run apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(STAMP)-%: pyproject.toml | $(STAMP)-python
	@echo "== $(VENV): pip install -e '.[$*]'"
	@$(PIP) install --editable '.[$*]'
	@touch $@
