# Two commands on a fresh machine: `make up` and `make test`. Environment and engine lie in
# .venv/, the model in models/.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE := $(VENV)/engine
MODEL  := models/tiny
SPEC   := examples/local.yaml

.PHONY: help setup up down test check acceptance bench clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed $(ENGINE)/.engine-installed $(MODEL)/config.json  ## environment, engine (CPU) and a small model

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(ENGINE)/.engine-installed: examples/cpu_engine/install.py $(wildcard examples/cpu_engine/cpu_engine/*.py) | $(VENV)/.installed
	$(BIN)/python examples/cpu_engine/install.py $(ENGINE)

$(MODEL)/config.json: | $(ENGINE)/.engine-installed
	TMPDIR=$(CURDIR)/$(VENV) $(ENGINE)/bin/python examples/cpu_engine/make_model.py $(MODEL)

up: setup  ## bring the example fleet up on this machine and ask it something
	$(BIN)/launcher up -f $(SPEC) --nodes 2
	$(BIN)/python examples/chat.py tiny

down:  ## stop the example fleet
	$(BIN)/launcher down -f $(SPEC)

test: setup check  ## everything that CI runs
	$(BIN)/python -m pytest -m "not acceptance"

check: $(VENV)/.installed  ## ruff, strict types, shellcheck of what is rendered
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -s bash .ci/run tests/cluster/init.sh sbatch_templates/bootstrap.sh
	$(BIN)/python -m pytest -q tests/launcher/test_rendered_lint.py

acceptance: setup  ## the full matrix, long faults and benchmarks; ONLY=… selects; results go to docs/
	$(BIN)/python -m tests.acceptance $(ONLY)

bench: setup  ## time to first token by hand and by launcher
	$(BIN)/python benchmarks/bringup.py

clean: down  ## remove the environment and the model
	rm -rf $(VENV) models
