# `make demo` and `make test` set up what they need; a second run sets up nothing.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n auto --maxprocesses=8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format lint types mutants diagnosis faults graphs fuzz tf-fixtures bench-load bench-moe bench-convert bench-generate clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 15

setup: $(READY) ## the environment in .venv; PYTHON=… chooses the interpreter

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "zoo needs Python 3.11 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo 'setting up $(VENV), once: this downloads torch'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,parity]'
	@touch $@

demo: $(READY) ## the main job, offline: make, plan, convert, load, prove, give back
	@$(RUN) tools/demo.py

test: $(READY) ## every test
	$(PYTEST)

test-fast: $(READY) ## the tests that take no more than a few seconds
	$(PYTEST) -m "not slow"

check: format lint types test ## what CI runs

format: $(READY)
	$(RUN) -m ruff format --check

lint: $(READY)
	$(RUN) -m ruff check

types: $(READY)
	$(RUN) -m mypy

mutants: $(READY) ## planted bugs × architectures: every one must be killed
	@$(RUN) tools/parity.py --mutants

diagnosis: $(READY) ## planted bugs × architectures: located and diagnosed, into docs/diagnosis.md
	@$(RUN) tools/parity.py --diagnose

faults: $(READY) ## conversions killed, torn and failed at every system call that changes a file
	@$(RUN) tools/faults.py

graphs: $(READY) ## every variant of every architecture as ONNX and .pt2, run and compared
	ZOO_GRAPHS=all $(PYTEST) tests/test_export_graphs.py

fuzz: $(READY) ## a million damaged headers, and GGUF files, indices, configs, zips and bundles
	@$(RUN) tools/fuzz.py

tf-fixtures: ## tests/data/tf anew, by TensorFlow in .venv-tf: a large download; no test needs it
	@test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	@.venv-tf/bin/python -m pip install -qq --disable-pip-version-check 'tensorflow-cpu>=2.16,<3'
	@TF_CPP_MIN_LOG_LEVEL=2 .venv-tf/bin/python tools/tf_fixtures.py

bench-load: $(READY) ## library import + load + first logits against the reference's
	@$(RUN) tools/bench.py load

bench-moe: $(READY) ## time a token takes against the experts it uses and those that exist
	@$(RUN) tools/bench.py moe

bench-convert: $(READY) ## conversions against cp of as many bytes, and the memory they take
	@$(RUN) tools/bench.py convert

bench-generate: $(READY) ## decoding and prefill against the reference's: clean, prepared, int8
	@$(RUN) tools/bench.py generate

clean: ## what builds and caches left; .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find zoo converters tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
