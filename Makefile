# Everything happens in this checkout: .venv (the environment), .cache (downloads), runs (output).
# Needs make and Python 3.10 or newer. `make help` lists what can be made.
SHELL := /bin/bash
BIN := .venv/bin
comma := ,

GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
EXTRAS ?= $(if $(filter-out 0,$(GPU)),vllm$(comma)dev,cpu$(comma)dev)
DATASET ?=
# Another data set is another run, so it gets a folder of its own.
RUN ?= runs/demo$(if $(DATASET),-$(notdir $(basename $(DATASET))))
PYTEST_ARGS ?=
# Files of tests side by side: much of a test is waiting, and a file that starts an engine keeps it to itself.
TEST_WORKERS ?= 2
export PYTHON EXTRAS TORCH_INDEX

STAMP := .venv/.made-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help env demo test test-long test-slurm lint bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14
	@echo "variables: EXTRAS=$(EXTRAS)  DATASET=<hub id or jsonl>  RUN=$(RUN)  PYTHON=<interpreter>  TORCH_INDEX=<url>  PYTEST_ARGS=..."

env: $(STAMP)  ## make .venv with everything in it

$(STAMP): setup.py pyproject.toml constraints.txt overrides.txt overrides-cpu.txt tools/make_env.sh
	@tools/make_env.sh
	@touch $@

demo: env  ## distil real weights (SmolLM2-135M, 24 layers from 30), print the result table
	@$(BIN)/python tools/demo_assets.py --out runs/assets
	@$(BIN)/opd-megatron train configs/demo.yaml output_dir=$(RUN) $(if $(DATASET),data.source='$(DATASET)')

test: env  ## the test suite, all but the long proofs
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-long: env  ## the long proofs: twenty kills, every engine layout, plans against real memory
	@$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

test-slurm: env  ## launch/slurm.sbatch on a real two-node cluster on this host (root; installs SLURM with apt-get)
	@command -v slurmctld >/dev/null || PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || \
	    { [ "$$(id -u)" = 0 ] && apt-get install -y --no-install-recommends slurm-wlm munge >/dev/null; } || \
	    echo "SLURM is not here and could not be installed: install slurm-wlm and munge" >&2
	@$(BIN)/python -m pytest -m slurm -rs tests/slurm $(PYTEST_ARGS)

lint: env  ## ruff, mypy; shellcheck and hadolint of launch/ where they are
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@[ ! -x $(BIN)/shellcheck ] || $(BIN)/shellcheck launch/*.sh launch/slurm.sbatch tools/*.sh .ci/run
	@[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint launch/Dockerfile

bench: env  ## measure what README's table claims, in a quick form
	@for script in $(filter-out benchmarks/_% benchmarks/harness.py,$(wildcard benchmarks/*.py)); do \
	    echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

clean:  ## remove .venv, .cache and everything built; runs/ stays
	@rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
