# concept_transfer: everything runs in .venv, which the targets make and fill themselves.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
REMOTE ?= remote
COUNT ?= 10000
PACKAGE := settings.ini setup.py pyproject.toml constraints.txt
WRITTEN := nbs tests tools benchmarks setup.py
NOTEBOOKS := OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
QUICK := not real and not study and not slow and not remote and not engines
ENGINES ?=
SELECT ?= engines
BENCHMARKS ?= peers extraction alignment evidence remote rollout engines gelu precision growth gpu
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast coverage fuzz test-remote test-engines check prepare readme studies benchmarks docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: .venv/.runtime ## the whole flow on two small embedded models, result in demo/
	$(BIN)/concept-transfer demo --out demo

test: .venv/.dev ## notebooks, then all tests but those of `test-remote`
	$(NOTEBOOKS) --skip_folder_re '^([_.]|studies$$)' --skip_file_re '^(_|\.|index|walkthrough|own_concept)'
	@echo "notebook cells skipped: $$(cat nbs/*.ipynb | grep -cE '#\| *(eval: *false|notest)|skip_exec: *true')"
	$(PYTEST) -m "not remote"

test-fast: .venv/.dev ## tests that need no real weights, study, browser or server, and do not take long
	$(PYTEST) -m "$(QUICK)"

coverage: .venv/.dev ## which lines the tests of `test-fast` run (tracing them takes longer than running them)
	$(PYTEST) -m "$(QUICK)" --cov --cov-report=term

fuzz: .venv/.dev ## mutated artefacts, journals and inputs (COUNT=10000), 300 flipped bits, 20 killed runs: nothing bare, nothing silent
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(COUNT)

test-remote: .venv/.dev ## against a real NDIF server on this machine (needs redis-server; installs 1.7 GB into .venv-server)
	$(BIN)/python tests/remote/stack.py install .venv-server
	CT_NDIF_VENV=$(CURDIR)/.venv-server OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(REMOTE)" tests/remote

test-engines: .venv/.dev ## transplants in llama.cpp, lm-eval, inspect-ai and vLLM (ENGINES=llama.cpp for one), which it installs in .venv-engines (0.2, 1, 0.3 and 3.5 GB)
	$(BIN)/python tests/engines/install.py .venv-engines $(ENGINES)
	CONCEPT_TRANSFER_ENGINES=$(CURDIR)/.venv-engines OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(SELECT)" tests/engines

check: .venv/.dev ## lint and types, nothing is changed
	$(BIN)/ruff check $(WRITTEN) concept_transfer
	$(BIN)/ruff format --check $(WRITTEN) concept_transfer
	$(BIN)/python tools/typecheck.py

prepare: .venv/.dev ## before every commit: format, lint, export modules, clean notebooks, render README
	$(BIN)/ruff check --fix $(WRITTEN)
	$(BIN)/ruff format $(WRITTEN)
	$(BIN)/nbdev_export
	$(BIN)/ruff format concept_transfer
	$(BIN)/nbdev_clean
	$(BIN)/python tools/docs.py readme

readme: .venv/.dev ## README.md from nbs/index.ipynb
	$(BIN)/python tools/docs.py readme

studies: .venv/.dev ## run all of nbs/studies again, each replaced when it is through (long)
	for nb in nbs/studies/*.ipynb; do \
	  $(BIN)/papermill --kernel python3 --cwd nbs/studies --no-progress-bar $$nb nbs/studies/.part.ipynb && mv nbs/studies/.part.ipynb $$nb || exit 1; done
	$(BIN)/nbdev_clean

benchmarks: .venv/.dev ## tables of run times of this processor, into benchmarks/RESULTS.md and nbs/benchmarks.ipynb (three hours; BENCHMARKS=peers for one)
	export CONCEPT_TRANSFER_ENGINES=$${CONCEPT_TRANSFER_ENGINES:-$(CURDIR)/.venv-engines}; \
	  for f in $(BENCHMARKS); do $(BIN)/python benchmarks/$$f.py || exit 1; done > benchmarks/RESULTS.part
	$(BIN)/python benchmarks/shared.py benchmarks/RESULTS.part benchmarks/RESULTS.md && rm benchmarks/RESULTS.part
	$(BIN)/papermill --kernel python3 --cwd nbs --no-progress-bar nbs/benchmarks.ipynb nbs/.part.ipynb && mv nbs/.part.ipynb nbs/benchmarks.ipynb
	$(BIN)/nbdev_clean

docs: .venv/.dev ## the site in _docs/: with Quarto if installed, else as a preview
	$(BIN)/python tools/docs.py site

clean: ## remove what was built, keep .venv
	rm -rf demo _proc _docs build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache
	find nbs concept_transfer tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.runtime: $(PACKAGE) | $(BIN)/pip
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo 'The venv module is missing (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv .venv
