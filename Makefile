# VisionZip projector tuning. `make help` lists the commands.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
BUDGET ?=
ARGS ?=
TO ?= hf
RUN ?= $(patsubst %/result.json,%,$(firstword $(shell ls -t runs/*/result.json 2>/dev/null)))
THE_RUN = $(or $(RUN),$(error there is no finished run in runs/: `make tune` makes one, or give RUN=FOLDER))
PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
TUNE := $(if $(MODEL),model=$(MODEL)) $(if $(BUDGET),reducer.budget=$(BUDGET)) $(ARGS)

export OMP_WAIT_POLICY ?= PASSIVE # threads that spin while others work stall a busy machine

# A mistyped setting would tune or measure something else. Names in capitals may be the environment's.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
WRONG := $(filter-out %_proxy,$(shell printf '%s\n' $(GIVEN) | grep '[a-z]'))
$(if $(WRONG),$(error $(WRONG): not a variable here; the model is MODEL=..., other settings go into ARGS="$(firstword $(WRONG))=..."))
OTHERS := $(if $(filter MODEL BUDGET,$(GIVEN)),$(filter-out setup data data-check cache tune,$(MAKECMDGOALS)))
$(if $(OTHERS),$(error MODEL and BUDGET are for data, data-check, cache and tune; `make $(firstword $(OTHERS))` takes RUN=... or ARGS="..."))

.DEFAULT_GOAL := help
.PHONY: help setup data data-check cache tune eval export demo figures efficiency report dashboard
.PHONY: bench bench-tower bench-prefill bench-loader test check format clean

# The embedded default is only prepared where it, or a tiny model with its pictures, is what is meant.
PREPARE := $(if $(filter-out smol %-tiny,$(MODEL)),,$(BIN)/python -m scripts.prepare.smol)

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/.done ## make .venv and install the pinned dependencies, once

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

data: setup ## fetch MODEL's data: the subset and its pictures, resumable; without MODEL the embedded default itself
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.fetch $(TUNE)

data-check: setup ## check MODEL's subset before a GPU is taken: pictures, labels, lengths; a table and a picture
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.check $(TUNE)

cache: setup ## compute the reducer's output for MODEL's subset once, to tune from with data.cache=true
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.cache $(TUNE)

tune: setup ## tune: MODEL=llava-7b BUDGET=64 ARGS="optim.lr=2e-5"
	$(PREPARE)
	$(BIN)/deepspeed --log_level warning --master_port $(PORT) train/tune.py $(TUNE)

eval: setup ## lmms-eval: full, free and tuned; RUN=runs/NAME (by default the newest), or a model with ARGS="--budget 64"
	$(BIN)/python -m scripts.evaluate.main $(THE_RUN) $(ARGS)

export: setup ## write RUN as TO=hf (a model for transformers), llava (mm_projector.bin) or peft (an adapter)
	$(BIN)/python -m scripts.export.main $(THE_RUN) $(TO) $(ARGS)

demo: setup ## a page to chat with RUN: kept tokens, and the answers of full, free and tuned side by side
	$(BIN)/python -m scripts.demo.main $(THE_RUN) $(ARGS)

figures: setup ## the paper's analyses of RUN, as pictures with the numbers beside them
	$(BIN)/python -m scripts.figures.main $(THE_RUN) $(ARGS)

efficiency: setup ## what RUN saves: prefill, time to first token, KV cache, memory; ARGS="--against OTHER"
	$(BIN)/python -m scripts.efficiency $(THE_RUN) $(ARGS)

report: setup ## compare all runs without wandb: their curves, and their part of RESULTS.md
	$(BIN)/python -m scripts.report $(ARGS)

dashboard: setup ## make the team's wandb workspace and report; ARGS="--entity TEAM", or ARGS=--dry-run
	$(BIN)/python -m scripts.dashboard $(ARGS)

bench: setup ## the fast path against the reference: steps/s, FLOPs, memory; ARGS="--shape llava-7b" on a GPU
	$(BIN)/python -m scripts.bench.step $(ARGS)

bench-tower: setup ## vision tower and reducer at CLIP-L/336 shape, against the released code's way
	$(BIN)/python -m scripts.bench.tower $(ARGS)

bench-prefill: setup ## prefill and time a token against the number of visual tokens; 13B reduced against 7B full
	$(BIN)/python -m scripts.bench.prefill $(ARGS)

bench-loader: setup ## pictures a second that a loader's worker makes ready, and the time until the first batch
	$(BIN)/python -m scripts.bench.loader $(ARGS)

test: setup ## all tests, in two processes of one thread each
	$(BIN)/python -m scripts.prepare.smol
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m 'not slow and not integration'

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## delete .venv and caches, but neither runs/ nor the prepared data
	rm -rf .venv .venv-eval build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
