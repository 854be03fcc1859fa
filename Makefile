# Every target makes .venv when it is missing and installs with the exact versions of constraints.txt, torch first.
PYTHON ?= python3
VENV   := .venv
# Test processes; each may need half a gigabyte.
WORKERS ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench fuzz soak

help: ## Say what the targets do.
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## Train a model on real digits over ten devices, under secure aggregation, and deliver it to them.
	$(BIN)/propolis simulate --task digits --protection secagg --codec dense --out runs/demo --force --deliver

test: $(VENV)/.dev ## Run the test suite.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev ## Lint, types and layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## Run the benchmarks (most of an hour).
	$(BIN)/propolis bench simulate
	$(BIN)/propolis bench secagg
	$(BIN)/propolis bench codec
	$(BIN)/propolis bench link
	$(BIN)/propolis bench edge
	$(BIN)/propolis bench delivery
	$(BIN)/propolis bench he

fuzz: $(VENV)/.dev ## Feed 100,000 random and mutated messages of each type to both roles (minutes).
	PROPOLIS_FUZZ_CASES=100000 $(BIN)/python -m pytest tests/attacks/test_fuzz.py

soak: $(VENV)/.dev ## Kill server and devices twenty times each in one run, and the other long tests (many minutes).
	PROPOLIS_SOAK_KILLS=20 $(BIN)/python -m pytest -m "soak or not soak" tests/integration/test_link_crashes.py
	$(BIN)/python -m pytest -m soak

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, %s is %d.%d: make PYTHON=python3.11" % ("$(PYTHON)", *v))'
	@echo "making $(VENV) (about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[sim,dev]'
	@touch $@ $(VENV)/.demo
