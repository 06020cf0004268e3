# Targets that work from a clean checkout with Python 3.11 to 3.13, pip and make.

SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# The environment that targets run in; the comparisons with PyTorch have one of their own, $(VENV)-parity.
VENV ?= .venv
# The first supported Python; another one: make test VENV=.venv312 PYTHON=python3.12
PYTHON ?= $(shell for p in $(VENV)/bin/python python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
# For two cores: some tests wait for processes of their own.
PYTEST_ARGS ?= -n 3
constraints = constraints/$$($(1)/bin/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt

SEED ?= 0

.PHONY: help setup quickstart test test-slow faults fuzz parity lint libtpu ray plans bench docs clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/stamp ## install jax_it and its test tools, at the tested versions, into .venv

quickstart: setup ## train a small model on the built-in data and export it: runs/quickstart
	$(VENV)/bin/jax-it train --config quickstart --workdir runs/quickstart
	$(VENV)/bin/jax-it export --workdir runs/quickstart --output runs/quickstart/export

test: setup ## the tests; PYTEST_ARGS="-n 4 -k metrics" chooses
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-slow: setup ## the slow tests
	$(VENV)/bin/python -m pytest -m "slow and not parity" $(PYTEST_ARGS)

faults: setup ## the long fault suite: runs that are stopped at many moments
	$(VENV)/bin/python -m pytest -m faults $(PYTEST_ARGS)

fuzz: $(VENV)-parity/stamp ## thousands of hostile inputs, some of them against PyTorch; SEED=7 draws others
	FUZZ_SEED=$(SEED) $(VENV)-parity/bin/python -m pytest -m fuzz tests/fuzz $(PYTEST_ARGS)

# With XLA's code generator that users have; the other tests use an older one of JAX 0.10, which compiles faster.
CODE_GENERATOR ?= default
parity: $(VENV)-parity/stamp ## the comparisons with PyTorch, in an environment of their own, .venv-parity
	JAX_IT_TEST_CODE_GENERATOR=$(CODE_GENERATOR) $(VENV)-parity/bin/python -m pytest -m parity $(PYTEST_ARGS)

lint: setup ## style, the layers of modules, and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(VENV)/bin/mypy

libtpu: setup ## TPU's compiler (700 MB), into .venv: with it `make test` compiles for TPU slices too
	$(VENV)/bin/python -m pip install -q -e '.[tpu]' -c $(call constraints,$(VENV))

ray: setup ## Ray (75 MB), into .venv: with it `make test-slow` runs data tools on a cluster of two nodes
	$(VENV)/bin/python -m pip install -q -e '.[ray]' -c $(call constraints,$(VENV))

plans: libtpu ## write the tables of plans in tpu/README.md again; half an hour
	$(VENV)/bin/python tpu/plans.py tpu/README.md

# Some hours, on a machine without other work; each script's docstring has a quick look.
DATA ?= data/t0/train.jsonl.gz
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
T5_TOKENIZER ?= google/t5-v1_1-small
bench: $(VENV)-parity/stamp ## measure on this CPU, beside PyTorch and CTranslate2: DATA=T0.jsonl.gz MODEL=FOLDER
	$(BENCH)/train.py --config t0_t5_small:random $(T0)
	$(BENCH)/memory.py --config t0_t5_small:random $(T0)
	$(BENCH)/packing.py --config t0_t5_small:random $(T0)
	$(BENCH)/generate.py --data $(DATA) --t5-tokenizer $(T5_TOKENIZER) --causal $(MODEL)
	$(BENCH)/prompt_lookup.py --data $(DATA) --model $(MODEL)
	$(BENCH)/int8.py
	$(BENCH)/data.py --data $(DATA) --model $(MODEL)
	$(BENCH)/startup.py
BENCH = $(VENV)-parity/bin/python bench
T0 = --config.model.tokenizer=$(T5_TOKENIZER) --config.data.train='[{"path": "$(DATA)"}]'

docs: setup ## the documentation site: docs/_build/html/index.html
	$(VENV)/bin/python -m pip install -q -e '.[docs]' -c $(call constraints,$(VENV))
	$(VENV)/bin/python -m sphinx -q -E -n -W --keep-going docs docs/_build/html

clean: ## remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-parity .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache build dist docs/_build
	find . -name __pycache__ -prune -exec rm -rf {} +

# `make test` must not need PyTorch, so .venv never holds it.
$(VENV)/stamp: EXTRAS = test
$(VENV)-parity/stamp: EXTRAS = test,parity
$(VENV)/stamp $(VENV)-parity/stamp: pyproject.toml $(wildcard constraints/*.txt)
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -e '.[$(EXTRAS)]' -c $(call constraints,$(@D))
	@touch $@
