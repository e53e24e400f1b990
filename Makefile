# Every target sets up .venv when it is missing or older than what it was made from.
PYTHON ?= python3
BIN := .venv/bin
DEMO_STAMP := .venv/.installed-demo
STAMP := .venv/.installed
LINT_STAMP := .venv/.installed-lint
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
IMAGE ?= demo
COSTS := hook_overhead generation cache_memory loading patching head_scores knockout causal_trace analysis_costs sae_stream feature_store
FINDINGS := quantized patch_importance tiles top_heads information_flow tuned_lens causal_trace_study trace_table editing features
QUESTION ?= What color is the star?

.DEFAULT_GOAL := help
.PHONY: help demo test test-random dist bench lint docs notebooks clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch goes first and by its exact version, so that no other package's wish for torch is heard before the constraint.
# The demo needs no development tools, and compiles to bytecode only what it imports.
$(DEMO_STAMP): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --no-compile "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --no-compile -e '.[viz]'
	@touch $@

$(STAMP): $(DEMO_STAMP)
	@$(PIP) -e '.[dev,viz,docs,quantized]'
	@touch $@

demo: $(DEMO_STAMP)  ## ask the embedded model about an image and write report.html
	@$(BIN)/hooked-llava explain $(IMAGE) "$(QUESTION)" -o report.html

# Many tests start a Python of their own: without bytecode each of them would compile torch again.
test: $(STAMP)  ## run the tests, the doctests and the notebooks, on up to four cores
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-random: $(STAMP)  ## run the property tests with fresh examples instead of the same ones every time
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 -m hypothesis --hypothesis-profile random

dist: $(STAMP)  ## build dist/*.whl and dist/*.tar.gz, without a network
	@$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'), b.build_wheel('dist')" >/dev/null
	@ls -sh dist

bench: $(STAMP)  ## run every benchmark (some hours); prints ratios and findings, writes JSON in benchmarks/results
	@set -e; for name in $(COSTS) $(FINDINGS); do $(BIN)/python -m benchmarks.$$name; done

# pyright brings Node.js, which is larger than all the rest of the tools: only who lints waits for it.
$(LINT_STAMP): $(STAMP)
	@$(PIP) -e '.[lint]'
	@touch $@

lint: $(LINT_STAMP)  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

docs: $(STAMP)  ## build the documentation in docs/_build/html
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

notebooks: $(STAMP)  ## execute the notebooks in place, outputs included
	@set -e; for notebook in notebooks/*.ipynb; do $(BIN)/jupyter-execute --inplace $$notebook; done

clean:  ## remove the virtual environment and caches
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis docs/_build build dist hooked_llava.egg-info report.html
