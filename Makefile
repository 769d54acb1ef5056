# Everything a clone needs. `make demo` and `make test` set themselves up; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
UV_VERSION := 0.13.9
BIN := .venv/bin
STAMP := .venv/.installed

# Nothing here phones home; each of these tools reads a switch of its own.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export ITERATIVE_DO_NOT_TRACK := 1
export DVC_STUDIO_OFFLINE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help setup play demo test bench lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) scm  ## .venv with the locked dependencies, and this project in it

# The first interpreter that runs, is new enough and can make a virtual environment.
$(STAMP): requirements.lock pyproject.toml
	@for python in $(PYTHON) python3.13 python3.14 python3 python "$$HOME"/.pyenv/versions/3.1[3-9]*/bin/python; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 13))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo 'error: no Python 3.13 or newer with venv found; install it (e.g. "uv python install 3.13" or "apt install python3.13-venv") or name it: make setup PYTHON=/path/to/python3.13' >&2; exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$found" --version); the first time downloads several GB (torch with CUDA)"; \
	"$$found" -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# DVC needs to be told when there is no git around it (an exported tree), and when there is one again.
.PHONY: scm
scm: | $(STAMP)
	@if [ -e .git ]; then grep -qs no_scm .dvc/config.local && $(BIN)/dvc config --local --unset core.no_scm || true; \
	else $(BIN)/dvc config --local core.no_scm true; fi

play: setup  ## watch the agent that ships with the repository, with its dream beside it, in a browser
	@$(BIN)/mario play --model pretrained --deterministic --web --open

demo: setup  ## the whole pipeline on the CPU in a few minutes, then where to look
	@$(BIN)/mario demo

test: setup  ## all tests
	@$(BIN)/python -m pytest

bench: setup  ## what updates, acting, the emulator and sampling cost on this machine
	@$(BIN)/python -m stages bench

lint: setup  ## style and unused code
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.13 --generate-hashes --no-header pyproject.toml
lock:  ## resolve pyproject.toml anew into requirements.lock and docker/*.lock (no registry is named in them)
	@$(COMPILE) --extra dev --extra pipeline -o requirements.lock
	@$(COMPILE) -c requirements.lock -o docker/stages.lock
	@$(COMPILE) --extra pipeline -c requirements.lock -o docker/services.lock

clean:  ## remove the environment and caches; data, checkpoints, runs and reports stay
	rm -rf .venv build ./*.egg-info .pytest_cache .ruff_cache
