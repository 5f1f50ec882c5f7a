# Tune the projector of a LLaVA-type model behind VisionZip. `make help` lists the commands.

PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# What a user may give.
MODEL ?=
BUDGET ?=
ARGS ?=
RUN ?=
TO ?= hf
EXTRAS ?=

# Quote a value for the shell: paths may hold spaces, and budgets brackets. A run may come from somebody else, and its
# name must not become a command. `value` keeps a dollar, which make would take for a variable.
quote = '$(subst ','\'',$(1))'

NEWEST = $(shell ls -t runs/*/result.json 2>/dev/null | sed -n '1s,/result.json$$,,p')
NO_RUN = $(error there is no finished run in runs/: `make tune` makes one, or give RUN=FOLDER)
THE_RUN = $(call quote,$(or $(value RUN),$(NEWEST),$(NO_RUN)))
TUNE := $(if $(MODEL),model=$(call quote,$(value MODEL))) $(if $(value BUDGET),reducer.budget=$(call quote,$(value BUDGET))) $(ARGS)

# A free port, so that two runs on one machine do not meet.
PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

# Threads that spin while they wait slow down a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Make ignores variables that no rule uses, so a mistyped setting would silently tune or measure something else.
# Names in capitals may belong to the environment, so only names with small letters are refused.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
WRONG := $(filter-out %_proxy,$(shell printf '%s\n' $(foreach name,$(GIVEN),$(call quote,$(name))) | grep '[a-z]'))
$(if $(WRONG),$(error $(WRONG): not a variable here; the model is MODEL=..., other settings go into ARGS="$(firstword $(WRONG))=..."))

OTHERS := $(if $(filter MODEL BUDGET,$(GIVEN)),$(filter-out setup data data-check cache tune,$(MAKECMDGOALS)))
$(if $(OTHERS),$(error MODEL and BUDGET are for data, data-check, cache and tune; `make $(firstword $(OTHERS))` takes RUN=... or ARGS="..."))

# Extras become names of targets, in which make takes a semicolon for the start of a command.
ODD := $(shell printf '%s' $(call quote,$(value EXTRAS)) | tr -d 'a-z0-9 -')
$(if $(ODD),$(error EXTRAS holds $(ODD): give names of extras in pyproject.toml, e.g. EXTRAS="video dev"))

# The tiny models use the tokenizer and the pictures of the embedded default; the other models need none of it.
PREPARE := $(if $(filter-out smol %-tiny,$(MODEL)),,$(BIN)/python -m scripts.prepare.smol)

# Packages that only some models need: a reader of video files, and of checkpoints in the layout of LLaVA's own code.
MODEL_EXTRAS := $(if $(findstring video,$(MODEL)),video) $(if $(findstring mini-gemini,$(MODEL)),llava)

.DEFAULT_GOAL := help
.PHONY: help setup data data-check cache tune eval export serve demo figures efficiency report dashboard
.PHONY: bench bench-tower bench-prefill bench-loader bench-serve test test-serve check faults format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/.done $(EXTRAS:%=.venv/.done-%) ## make .venv with what `make tune` needs; EXTRAS="video dev" adds extras of pyproject.toml

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[train,smol]'
	touch $@

# An extra is installed by the first command that needs it.
.venv/.done-%: .venv/.done
	$(PIP) $(call quote,vzip[$*])
	touch $(call quote,$@)

data data-check cache tune: $(MODEL_EXTRAS:%=.venv/.done-%)
data-check figures report: .venv/.done-figures
eval: .venv/.done-eval
demo: .venv/.done-demo
dashboard: .venv/.done-dashboard
test check faults format: .venv/.done-dev

data: setup ## fetch the training data of MODEL, resumable; without MODEL, prepare the embedded default
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.fetch $(TUNE)

data-check: setup ## check the training data of MODEL before a GPU is taken: pictures, labels and lengths
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.check $(TUNE)

cache: setup ## compute the reducer's output for the training data of MODEL once; tune with data.cache=true
	$(PREPARE)
	$(BIN)/python -m scripts.prepare.cache $(TUNE)

tune: setup ## tune the projector: MODEL=llava-7b BUDGET=64 ARGS="optim.lr=2e-5"
	$(PREPARE)
	$(BIN)/python -m train.guards.launch --log_level critical --master_port $(PORT) train/tune.py $(TUNE)

eval: setup ## run lmms-eval on RUN (default: the newest run), or on a model with ARGS="--budget 64"
	$(BIN)/python -m scripts.evaluate.main $(THE_RUN) $(ARGS)

export: setup ## write RUN as TO=hf (a model for transformers), llava (mm_projector.bin) or peft (an adapter)
	$(BIN)/python -m scripts.export.main $(THE_RUN) $(call quote,$(value TO)) $(ARGS)

serve: setup ## serve RUN with vLLM behind OpenAI's API on 127.0.0.1; ARGS="--port 8000", and options of vLLM
	$(BIN)/python -m scripts.serve.main $(THE_RUN) $(ARGS)

demo: setup ## serve a page to chat with RUN: the kept tokens, and the answers of all settings side by side
	$(BIN)/python -m scripts.demo.main $(THE_RUN) $(ARGS)

figures: setup ## draw the paper's analyses for RUN, with the numbers beside them
	$(BIN)/python -m scripts.figures.main $(THE_RUN) $(ARGS)

efficiency: setup ## measure what RUN saves: prefill, first token, KV cache, memory; ARGS="--against OTHER"
	$(BIN)/python -m scripts.efficiency.main $(THE_RUN) $(ARGS)

report: setup ## compare all runs without wandb: their curves, and their part of RESULTS.md
	$(BIN)/python -m scripts.report $(ARGS)

dashboard: setup ## make the team's wandb workspace and report: ARGS="--entity TEAM", or ARGS=--dry-run
	$(BIN)/python -m scripts.dashboard $(ARGS)

bench: setup ## compare the fast path with the reference: steps/s, FLOPs, memory; ARGS="--shape llava-7b" on a GPU
	$(BIN)/python -m scripts.bench.step $(ARGS)

bench-tower: setup ## compare tower and reducer with the authors' code, at the shape of CLIP-L/336
	$(BIN)/python -m scripts.bench.tower $(ARGS)

bench-prefill: setup ## time prefill and decoding for several numbers of visual tokens; a reduced 13B against a full 7B
	$(BIN)/python -m scripts.bench.prefill $(ARGS)

bench-loader: setup ## count the pictures that a data loader worker prepares per second, and time the first batch
	$(BIN)/python -m scripts.bench.loader $(ARGS)

bench-serve: setup ## serve all tokens and a tenth of them under the same load: requests/s, first token, KV cache
	$(BIN)/python -m scripts.serve.bench $(ARGS)

test: setup ## run all tests, in two processes
	$(BIN)/python -m scripts.prepare.smol
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-serve: setup ## run the tests of serving, in the environment of vLLM
	$(BIN)/python -m scripts.prepare.smol
	$(BIN)/python -m scripts.serve.environment
	OMP_NUM_THREADS=1 .venv-serve/bin/python -m pytest --confcutdir tests/serve tests/serve

check: setup ## check format, lint and types, and run the fast tests
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --hypothesis-profile quick -m 'not slow and not integration'

faults: setup ## try what disks, clusters and strangers do, in 15 minutes: ARGS="--only kill --budget 60"
	$(BIN)/python -m tests.faults $(ARGS)

format: setup ## format the code
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean: ## delete .venv and caches, but neither runs/ nor the prepared data
	rm -rf .venv .venv-eval* .venv-serve* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
