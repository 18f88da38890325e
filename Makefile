# `make demo` and `make test` set up what they need; a second run sets up nothing.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
# Each file's tests run in one process, so that its module fixtures are built once. Compiled files
# are kept whatever the shell says: tests start dozens of processes that import zoo.
PYTEST := PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n auto --maxprocesses=8 --dist loadfile
QUICK := not slow and not long and not release

.DEFAULT_GOAL := help
.PHONY: help setup demo example test test-all check stamps format lint types mutants mutate diagnosis formats report faults graphs fuzz tf-fixtures bench-import bench-load bench-moe bench-convert bench-generate bench-info clean

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

example: $(READY) ## induction heads: a small model is trained, looked into and taken apart
	@$(RUN) examples/induction.py

test: $(READY) ## in five minutes: every behavior, of many alike the first
	$(PYTEST) -m "$(QUICK)"

test-all: $(READY) ## every test of every variant; REST=1 leaves out what `make test` runs
	$(PYTEST) -m "$(if $(REST),not ($(QUICK)) and )not release"

check: format lint types test ## what CI runs, before `make test-all`

stamps: $(READY) ## at a release: zoo/evidence.json was measured on this code, torch and transformers
	@$(PYTEST) -n 0 -q -m release tests/test_evidence.py

format: $(READY)
	$(RUN) -m ruff format --check

lint: $(READY)
	$(RUN) -m ruff check

types: $(READY)
	$(RUN) -m mypy

mutants: $(READY) ## planted bugs × architectures: every one must be killed
	@$(RUN) tools/parity.py --mutants

report: $(READY) ## all that parity measures, as a page in report/ and into zoo/evidence.json
	@$(RUN) -m zoo verify --all --html report --record

formats: $(READY) ## each dialect to each other and back: docs/formats.md, zoo/evidence.json
	@$(RUN) tools/parity.py --formats --write docs/formats.md --record

diagnosis: $(READY) ## planted bugs, located and diagnosed: docs/diagnosis.md, zoo/evidence.json
	@$(RUN) tools/parity.py --diagnose --write docs/diagnosis.md --record

mutate: $(READY) ## mutation testing of zoo's own code: named mutants and a sample; N=200, N=--all
	@$(RUN) tools/mutate.py $(N)

faults: $(READY) ## conversions killed, torn and failed at every system call that changes a file
	@$(RUN) tools/faults.py

graphs: $(READY) ## every variant of every architecture as ONNX and .pt2, run and compared
	ZOO_GRAPHS=all $(PYTEST) tests/saving/test_export_graphs.py

fuzz: $(READY) ## 100,000 damaged inputs of each kind that is read, and a million headers
	@$(RUN) tools/fuzz.py

tf-fixtures: ## tests/data/tf anew, by TensorFlow in .venv-tf: a large download; no test needs it
	@test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	@.venv-tf/bin/python -m pip install -qq --disable-pip-version-check 'tensorflow-cpu>=2.16,<3'
	@TF_CPP_MIN_LOG_LEVEL=2 .venv-tf/bin/python tools/tf_fixtures.py

bench-import: $(READY) ## processor time of import zoo, of a process's first load and of zoo list
	@$(RUN) tools/bench.py import

bench-load: $(READY) ## library import + load + first logits against the reference's
	@$(RUN) tools/bench.py load

bench-moe: $(READY) ## time a token takes against the experts it uses and those that exist
	@$(RUN) tools/bench.py moe

bench-convert: $(READY) ## conversions against cp of as many bytes, and the memory they take
	@$(RUN) tools/bench.py convert

bench-generate: $(READY) ## decoding and prefill against the reference's: clean, prepared, int8
	@$(RUN) tools/bench.py generate

bench-info: $(READY) ## zoo info of 70 billion parameters in each kind of file, headers alone
	@$(RUN) tools/bench.py info

clean: ## what builds and caches left; .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find zoo converters tools examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
