# The two commands of the README are `make run` and `make test`; both rest on `make setup`.
#
#   PYTHON=python3.12     which Python makes .venv (3.11 to 3.13)
#   TORCH_INDEX=URL       a further package index, for another build of torch (the CPU's is a tenth of the size:
#                         https://download.pytorch.org/whl/cpu)
#   FASTA=path            what `make run` embeds
#   RUNS=number           how many inputs `make fuzz` tries
#   SEEDS=n               how many schedules of faults `make chaos` runs

SHELL := /bin/bash
PYTHON ?= python3
FASTA ?= samples/proteins.fasta
RUNS ?= 1000000
SEEDS ?= 20
export FASTA
BIN := .venv/bin
INSTALLED := .venv/installed
# In the order of collection: those of the whole stack come first, as they take longest.
IN_PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup run up down secrets lint docs test test-system screenshots compose-test test-gpu chaos fuzz bench bench-gpu

help:
	@echo "make run          set up, start everything, embed FASTA=$$FASTA, print a summary, stop"
	@echo 'make test         set up, then every check and test that needs no GPU, root or browser'
	@echo 'make setup        .venv with the pinned dependencies; PYTHON=python3.12 and TORCH_INDEX=url choose others'
	@echo 'make up, down     start the stack and keep it; stop it'
	@echo 'make secrets      what docker-compose.yml needs before its first start (docs/operations.md)'
	@echo 'make lint         style, types, and which room may import which'
	@echo 'make docs         docs/reference.md, from the code'
	@echo 'make test-system  the tests that need root or system packages (chromium and its driver among them)'
	@echo 'make screenshots  what those in the browser see, into docs/screenshots'
	@echo 'make compose-test the deployment with Docker: build, start, restart all of it in mid-job, check, take down'
	@echo 'make test-gpu     the tests that need an NVIDIA GPU'
	@echo 'make chaos        each fault, then SEEDS=$(SEEDS) schedules of them, and whether every promise was kept'
	@echo 'make fuzz         hostile files and messages, RUNS of them'
	@echo 'make bench        the benchmarks, into benchmarks/results; bench-gpu: those for one and two GPUs'

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo 'Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo 'The venv module is needed (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@echo 'Installing into .venv takes some minutes.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	@touch $@

run: $(INSTALLED)
	$(BIN)/virnucpro demo "$$FASTA"

up: $(INSTALLED)
	$(BIN)/virnucpro up

down: $(INSTALLED)
	$(BIN)/virnucpro down

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m virnucpro_core.cli.reference docs/reference.md

test: lint
	$(BIN)/pytest $(IN_PARALLEL) -m 'not gpu and not system and not chaos'

test-system: $(INSTALLED)
	$(BIN)/pytest -m system

screenshots: $(INSTALLED)
	SCREENSHOTS=docs/screenshots $(BIN)/pytest --basetemp=/tmp/virnucpro-pictures -m system -k browser

# Needs no .venv: a host that only runs containers has none.
secrets:
	@$(PYTHON) deploy/make_secrets.py
	@echo 'next: docker compose build, then docker compose up -d (docs/operations.md)'

# Here the tests are the purpose: without Docker they fail, where test-system skips them.
compose-test: $(INSTALLED)
	MUST_RUN=1 $(BIN)/pytest -m system -rs tests/compose

test-gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu

chaos: $(INSTALLED)
	$(BIN)/pytest -m chaos
	$(BIN)/python -m tests.faults.chaos --seeds $(SEEDS)

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --runs $(RUNS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.registration
	$(BIN)/python -m benchmarks.ledger

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_extract
	$(BIN)/python -m benchmarks.gpu_fidelity
	$(BIN)/python -m benchmarks.gpu_pipeline
