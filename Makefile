# make demo | test | check | bench: each needs only Python 3.11+ and make, and builds .venv when it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Tests wait a lot: for servers, timers and each other's processes. Four at a time keep two cores busy.
WORKERS ?= 4

BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.stamp
PIP   := $(BIN)/python -m pip -qq --disable-pip-version-check

# nats-server comes as a wheel and is found like redis-server and memcached: on the PATH.
export PATH := $(BIN):$(PATH)
# Tests start hundreds of interpreters, each of which would compile everything anew where this is set.
unexport PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test fuzz check bench path soak faults docs format venv servers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS='-k lease' is handed on, WORKERS=0 tests one after the other"

demo: $(STAMP)-demo ## a cache at work, in the terminal
	@$(BIN)/python examples/demo.py $(ARGS)

demo-cluster: $(STAMP)-dev ## NATS, Redis, two workers and an application; one worker is killed
	@$(BIN)/python -m examples.demo_cluster $(ARGS)

test: $(STAMP)-dev servers ## the whole test suite
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

fuzz: $(STAMP)-dev ## a million random and mutated payloads, and as many message bodies
	@CACHEBUS_FUZZ=1000000 $(BIN)/python -m pytest tests/payload/test_fuzz.py tests/bus/codec/test_fuzz.py --timeout 0 $(ARGS)

check: $(STAMP)-dev ## lint, format, types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(STAMP)-bench servers ## cachebus beside its peers
	@$(BIN)/python -m benchmarks $(ARGS)

path: $(STAMP)-dev servers ## count the calls an operation makes: ARGS='redis-hit' prints its path
	@$(BIN)/python -m benchmarks.path $(ARGS)

faults: $(STAMP)-dev servers ## break what is between a cache and its Redis, and write docs/reliability.md
	@$(BIN)/python -m tests.faults $(ARGS)

soak: $(STAMP)-dev ## a million simulated worlds: ARGS='2000001 --seeds 50000' chooses which
	@$(BIN)/python -m tests.loading.simulation $(or $(ARGS),1 --seeds 1000000)

docs: $(STAMP)-dev ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

format: $(STAMP)-dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

venv: $(STAMP)-dev ## .venv with everything for development
	@echo "source $(VENV)/bin/activate"

servers:
	@sh tests/install-servers.sh

clean: ## remove .venv, caches and build results
	@rm -rf $(VENV) build dist site .coverage .coverage.* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find cachebus tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as its last successful install: a second run asks pip nothing.
$(STAMP)-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cachebus needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(STAMP)-%: pyproject.toml | $(STAMP)-python
	@echo "== $(VENV): pip install -e '.[$*]'"
	@$(PIP) install --editable '.[$*]'
	@touch $@
