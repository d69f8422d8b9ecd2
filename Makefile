# make quickstart   the main job, end to end: train a search agent on this machine (about 5 minutes after installing)
# make test         every test;  make test-fast  those that take seconds
# make check        lint, format, types, import contracts: what CI runs
# make venv         .venv from requirements/{cpu,gpu}.lock;  make doctor  what is wrong and how to mend it
SHELL := /bin/bash
PLATFORM ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv doctor check format test test-fast quickstart clean

help:
	@sed -n 's/^# //p' Makefile | head -4

venv: .venv/.installed

.venv/.installed: requirements/$(PLATFORM).lock
	@bash scripts/install.sh $(PLATFORM)

doctor: venv
	@$(BIN)/python scripts/doctor.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: venv
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: venv
	$(BIN)/python -m pytest -m "not slow and not vllm" $(PYTEST_ARGS)

quickstart: venv
	@$(BIN)/python scripts/quickstart.py $(QUICKSTART_ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
