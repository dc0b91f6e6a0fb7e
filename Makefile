# Two environments' worth of packages in one folder: `setup` is what jaxwm needs to run,
# `setup-dev` adds what the tests and the linters need. Both do nothing when up to date.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev

SEED ?= 0
RUN ?= runs/demo
DEMO ?= train dreamer_v3 --preset cartpole
TESTS ?= tests
WORKERS ?= 2
LEARNING := tests/test_learning.py
FAULTS := tests/test_faults.py tests/test_odd_places.py tests/multi_device
RESULTS ?= benchmarks/results

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-faults test-learning lint format notebooks bench faults clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(RUNTIME) ## install jaxwm into .venv

setup-dev: $(DEV) ## the same, with the tools for tests and style

demo: $(RUNTIME) ## train DreamerV3 on CartPole into runs/demo (SEED=1: other random numbers)
	$(PY) -m jaxwm.cli $(DEMO) --run $(RUN) --seed $(SEED)

test: $(DEV) ## run the tests, with the coverage gate
	$(PY) -m pytest $(TESTS) $(LEARNING:%=--ignore=%) $(FAULTS:%=--ignore=%) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov

test-faults: $(DEV) ## kill runs, fill disks, damage checkpoints; several processes, many devices
	$(PY) -m pytest $(FAULTS) -n $(WORKERS) --dist loadgroup

test-learning: $(DEV) ## learn every toy environment to its optimum (not part of CI)
	LEARNING_RESULTS=$(RESULTS)/toys.jsonl $(PY) -m pytest $(LEARNING) -n $(WORKERS) --dist loadgroup

lint: $(DEV) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(DEV) ## rewrite files in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(DEV) ## run every notebook from top to bottom
	$(PY) -m pytest tests/test_notebooks.py

bench: $(RUNTIME) ## measure speed, scaling, memory and compile time, each in short
	$(PY) -m benchmarks.throughput --size nano size1m --obs vector image --no-loop --out $(RESULTS)/throughput.jsonl
	$(PY) -m benchmarks.loop --collect-envs 16 1024 --out $(RESULTS)/loop.jsonl
	$(PY) -m benchmarks.scaling --envs 1 64 1024 8192 --seeds 1 8 --sizes nano size1m --out $(RESULTS)/scaling.jsonl
	$(PY) -m benchmarks.memory --sizes nano size1m size12m --out $(RESULTS)/memory.jsonl
	$(PY) -m benchmarks.compile_time --sizes nano --out $(RESULTS)/compile_time.jsonl

faults: $(DEV) ## kill, stop, corrupt, fill disks, diverge, race: an evening of it
	for test in kill signals corrupt cuts disk diverge races changed preflight cost soak; do \
		$(PY) -m tests.faults.$$test --out $(RESULTS)/reliability.jsonl || exit 1; \
	done

clean: ## remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A folder left half made (an interrupted download, a Python since removed) is made again.
define environment
@command -v $(PYTHON) >/dev/null || { echo "jaxwm needs Python 3.11 or newer, and there is no \
'$(PYTHON)' here. Install it, or name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxwm needs Python \
3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: \
make PYTHON=python3.12" >&2; exit 1; }
@$(PY) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
endef

$(RUNTIME): pyproject.toml constraints.txt
	$(environment)
	@echo "Installing jaxwm and what it needs into $(VENV): a few minutes the first time."
	@$(PIP) install -c constraints.txt -e .
	@touch $(RUNTIME)

$(DEV): pyproject.toml constraints.txt
	$(environment)
	@echo "Installing jaxwm and its development tools into $(VENV): a few minutes the first time."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(RUNTIME) $(DEV)
