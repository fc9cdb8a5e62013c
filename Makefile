# Every target sets up what it needs; a machine needs make, Python 3.12 to 3.14 with venv, and a network connection. The targets that
# run transformers (golden-env, golden, check-transformers) also need Python 3.11. See `make help`.

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
GOLDEN_VENV := .venv-golden
AOT_VENV := .venv-aot
OLDEST_VENV := .venv-oldest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check
TEST_WORKERS ?= 2
# One worker per file: it makes what the tests of a file share once, and compiles less.
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
# `make aot-tpu AOT_TPU_ARGS=` compiles the script's own sample of TPU kernels, a quarter of an hour; AOT_TPU_ARGS=--all every one, hours.
AOT_TPU_ARGS ?= --models olmoe-1b-7b gpt-oss-120b --tokens 2048
# What has to be set before jax is imported, to compile for hardware that this machine lacks.
AOT_ENVIRONMENT := JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 TPU_SKIP_MDS_QUERY=1 \
	ALLOW_MULTIPLE_LIBTPU_LOAD=1

# The environment that these targets set up holds the CPU build of jax; JAX_PLATFORMS=... overrides.
export JAX_PLATFORMS ?= cpu

##@ For everyone

demo: $(VENV)/.installed  ## Inspect, convert, verify and run the example checkpoint (examples/demo_model)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo build/demo

test: $(VENV)/.installed-test  ## Run the tests, except those marked slow
	$(PYTEST) $(PYTEST_ARGS)

help:  ## Show this text
	@awk -F ':.*##' '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*##/ {printf "  make %-20s%s\n", $$1, $$2}' Makefile

##@ For contributors

test-slow: $(VENV)/.installed-test  ## Run only the tests marked slow
	$(PYTEST) -m "slow and not transformers" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test  ## Run all tests
	$(PYTEST) -m "not transformers" $(PYTEST_ARGS)

lint: style types  ## Check style, formatting and types

style: $(VENV)/.installed-test  ## Check style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test  ## Format the code
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .

types: $(VENV)/.installed-test  ## Check types, on the sources laid out as they are installed (build/types)
	@rm -rf build/types
	@$(BIN)/python -W ignore setup.py --quiet build --build-base build/setuptools --build-lib build/types
	$(BIN)/basedpyright

golden-env: $(GOLDEN_VENV)/.installed  ## Set up torch and transformers in .venv-golden (Python 3.11, 1.2 GB)

golden: $(GOLDEN_VENV)/.installed  ## Write the golden files of tests/golden anew, with transformers
	$(GOLDEN_VENV)/bin/python tests/golden/make_golden.py

check-transformers: $(VENV)/.installed-test $(GOLDEN_VENV)/.installed  ## Run the checks that need transformers itself
	$(BIN)/python -m pytest -m transformers $(PYTEST_ARGS) tests/transformers

aot: aot-gpu aot-tpu aot-parallel aot-models  ## Compile kernels, layers and models for GPUs and TPUs you don't have, and check the code

aot-gpu: $(AOT_VENV)/.installed  ## Of these, every kernel for GPUs (AOT_ARGS=... for options), and what a call launches and waits for
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/gpu_kernels.py --output build/aot $(AOT_ARGS)
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/gpu_launches.py

aot-tpu: $(AOT_VENV)/.installed  ## Of these, some kernels for TPUs (AOT_TPU_ARGS= for a sample, AOT_TPU_ARGS=--all for all: hours), a layer and a model on 4 TPUs
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/tpu_kernels.py --output build/aot $(AOT_TPU_ARGS)
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/expert_parallel_kernel.py --models qwen3-30b-a3b --tokens 128 \
	    --output build/aot/expert_parallel_kernel.json
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/tpu_slices.py --slices v6e:2x2 --output build/aot

aot-parallel: $(AOT_VENV)/.installed  ## Of these, an expert-parallel layer: what it moves, what it computes meanwhile, and moving experts between ranks
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/expert_parallel_layer.py --output build/aot/expert_parallel_layer.json
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/expert_moves.py v6e:2x2 h200:1x8

aot-models: $(AOT_VENV)/.installed  ## Of these, a tiny and a huge model for GPUs and TPUs, with moe-jax compile
	$(AOT_VENV)/bin/python tests/aot/compile_command.py

aot-megablox: $(AOT_VENV)/.installed  ## Compare the TPU kernels with megablox, without running them (half an hour)
	$(AOT_ENVIRONMENT) $(AOT_VENV)/bin/python tests/aot/tpu_megablox.py --output build/aot $(AOT_MEGABLOX_ARGS)

test-oldest: $(OLDEST_VENV)/.installed  ## Test and compile the kernels with the oldest supported jax
	$(OLDEST_VENV)/bin/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS) tests/kernels tests/aot
	$(AOT_ENVIRONMENT) $(OLDEST_VENV)/bin/python tests/aot/gpu_kernels.py --output build/aot-oldest $(AOT_ARGS)

bench: $(VENV)/.installed-test  ## Measure the time of imports on this machine; JSON under build/benchmarks
	@mkdir -p build/benchmarks
	$(BIN)/python benchmarks/import_time.py --json build/benchmarks/import_time.json

constraints: $(VENV)/.installed-test  ## Write constraints.txt from what .venv holds now
	@mkdir -p build
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --all --exclude moe-jax --exclude pip; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## Remove what was built, and the environments
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV) $(GOLDEN_VENV) $(AOT_VENV) $(OLDEST_VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A stamp file marks an environment as complete; it is set up again when a file that it was made from changes.

$(VENV)/bin/python: | scripts/find-python
	@python="$${PYTHON:-$$(scripts/find-python)}" && test -n "$$python" && \
	echo "Setting up $(VENV) with $$("$$python" -V) ($$python)" && \
	"$$python" -m venv --clear $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	@echo "Installing moe_jax into $(VENV)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt setuptools
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

$(AOT_VENV)/.installed: pyproject.toml setup.py constraints.txt constraints-aot.txt | scripts/find-python
	@python="$${PYTHON:-$$(scripts/find-python)}" && test -n "$$python" && \
	echo "Setting up $(AOT_VENV) with $$("$$python" -V) ($$python)" && \
	"$$python" -m venv --clear $(AOT_VENV)
	@$(AOT_VENV)/bin/python $(PIP_INSTALL) -c constraints-aot.txt setuptools
	@$(AOT_VENV)/bin/python $(PIP_INSTALL) -c constraints-aot.txt --no-build-isolation -e '.[aot]'
	@touch $@

# The lines of constraints-oldest.txt replace those of constraints.txt that name the same packages.
$(OLDEST_VENV)/.installed: pyproject.toml setup.py constraints.txt constraints-oldest.txt | scripts/find-python
	@python="$${PYTHON:-$$(scripts/find-python)}" && test -n "$$python" && \
	echo "Setting up $(OLDEST_VENV) with $$("$$python" -V) ($$python)" && \
	"$$python" -m venv --clear $(OLDEST_VENV)
	@mkdir -p build
	@{ cat constraints-oldest.txt; \
	   grep -vf <(sed -n 's/^\([A-Za-z0-9_-]*==\).*/^\1/p' constraints-oldest.txt) constraints.txt; } > build/constraints-oldest.txt
	@$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c build/constraints-oldest.txt setuptools
	@$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c build/constraints-oldest.txt --no-build-isolation -e '.[aot]' \
	    hypothesis pytest pytest-xdist
	@touch $@

$(GOLDEN_VENV)/.installed: tests/golden/requirements.txt
	@python="$${GOLDEN_PYTHON:-$$(scripts/find-python 3.11 3.11)}" && test -n "$$python" && \
	echo "Setting up $(GOLDEN_VENV) with $$("$$python" -V) ($$python)" && \
	"$$python" -m venv --clear $(GOLDEN_VENV)
	@$(GOLDEN_VENV)/bin/python $(PIP_INSTALL) -r tests/golden/requirements.txt
	@touch $@

.PHONY: demo test help test-slow test-all lint style format types golden-env golden check-transformers aot aot-gpu aot-tpu aot-models aot-parallel aot-megablox test-oldest bench \
	constraints clean
