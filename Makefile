# dtvla. `make` lists the targets. Each target does the set-up that it needs; nothing has to be run before it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PY   := $(VENV)/bin/python

# make quickstart: what is learnt, and where the results go
SUITE    ?= libero_goal
TASK     ?= 1
EPISODES ?= 100
OUT      ?= outputs/quickstart$(if $(filter-out libero_goal-1,$(SUITE)-$(TASK)),-$(SUITE)-$(TASK))

# make test: what pytest gets, e.g. make test TESTS=tests/policy PYTEST="-x -k attention"; JOBS test files at a time
TESTS  ?= tests
PYTEST ?=
JOBS   ?= 2

STUDIES = $(notdir $(patsubst %/commands.sh,%,$(wildcard experiments/*/commands.sh)))

.PHONY: help setup doctor quickstart test test-fast lint format lock notebook clean

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## make .venv with the exact packages of requirements.lock (a second run takes no time)
	@VENV=$(VENV) tools/setup.sh

doctor: setup ## is this machine fit? versions, GPU, rendering, MuJoCo drift, disk
	@$(PY) -m dtvla.doctor

quickstart: ## demonstrations, training, evaluation and a report for one task (SUITE, TASK, EPISODES, OUT)
	@began=$$(date +%s.%N) && VENV=$(VENV) tools/setup.sh && $(PY) tools/quickstart.py \
	  --began $$began --suite $(SUITE) --task $(TASK) --episodes $(EPISODES) --out $(OUT)

reproduce-%: setup ## run a study of experiments/ again, e.g. reproduce-latency; results in outputs/reproduce/
	@test -f experiments/$*/commands.sh || \
	  { echo "error: reproduce-$*: no such study; choose one of $(STUDIES)" >&2; exit 2; }
	@mkdir -p outputs/reproduce/$* && ln -sfn "$(CURDIR)/tools" outputs/reproduce/$*/tools
	@cd outputs/reproduce/$* && PATH="$(abspath $(VENV))/bin:$$PATH" env -u DTVLA_ROOT \
	  bash -euxo pipefail "$(CURDIR)/experiments/$*/commands.sh"

test: setup lint ## everything: ruff, mypy, and all tests on the real simulator (TESTS, PYTEST)
	@tools/browser.sh
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS) $(PYTEST)

test-fast: setup ## the tests that need neither the simulator nor more than seconds
	@$(PY) -m pytest $(TESTS) -m "not slow and not sim" $(PYTEST)

lint: setup ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup ## let ruff format the code and mend what it can
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lock: setup ## renew requirements.lock from pyproject.toml (needs uv); keeps versions that still fit
	@tools/lock.sh

notebook: ## Jupyter on notebooks/
	@VENV=$(VENV) tools/setup.sh notebook
	@$(PY) -m jupyter lab notebooks/

clean: ## remove caches and build products; results in outputs/ and .venv stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
