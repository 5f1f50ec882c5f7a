# VisionZip projector tuning. `make help` lists the commands.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
BUDGET ?=
ARGS ?=
PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
TUNE := $(if $(MODEL),model=$(MODEL)) $(if $(BUDGET),reducer.budget=$(BUDGET)) $(ARGS)

export OMP_WAIT_POLICY ?= PASSIVE # threads that spin while others work stall a busy machine

.DEFAULT_GOAL := help
.PHONY: help setup data tune test check format clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/.done ## make .venv and install the pinned dependencies, once

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

data: setup ## prepare the embedded default (model and easy-VQA) and the tiny models in the cache, once
	$(BIN)/python scripts/prepare_smol.py

# The embedded default is only prepared where it, or a tiny model with its pictures, is what is tuned.
tune: setup $(if $(filter-out smol %-tiny,$(MODEL)),,data) ## tune: MODEL=llava-7b BUDGET=64 ARGS="optim.lr=2e-5"
	$(BIN)/deepspeed --log_level warning --master_port $(PORT) train/tune.py $(TUNE)

test: setup data ## all tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not integration'

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## delete .venv and caches, but neither runs/ nor the prepared data
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
