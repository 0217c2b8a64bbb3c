# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Tests run in this many processes, of one thread each. Of three one mostly waits, for machines of the cluster's lab.
JOBS   ?= 3
test test-fast test-nightly: export OMP_NUM_THREADS ?= 1
test test-fast test-nightly: export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Ray starts a dozen Python processes: without cached bytecode each compiles its imports anew, half a minute a run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-organism check types docs test test-fast test-nightly setup clean

# Modules are compiled when they are first imported, not all of them here. Set-up runs again when the pins or the
# package's own metadata change.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .[gguf]
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e .[dev]
	touch $@

setup: $(VENV)/.installed-dev

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(INSTALL) -e .[docs]
	touch $@

# A small real model unlearns its disclaimers, on fewer prompts than the preset has: minutes on two cores.
DEMO := --study.n-startup-trials 5 --prompts.n-validation 40 --prompts.n-test 20 --prompts.n-finalists 10 \
        --selection.finalists 3

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/bruno-ray model smollm2
	$(BIN)/bruno-ray run smollm2 --behaviour disclaimers --trials 10 $(DEMO) --auto-select --study-name demo
	@echo "The report is in $(CURDIR)/runs/demo/report.html, the saved model with its card in runs/demo/model"

# The embedded organism, trained here: whether hidden facts come back is right or wrong.
demo-organism: $(VENV)/.installed
	rm -rf runs/demo-organism
	$(BIN)/bruno-ray organism
	$(BIN)/bruno-ray run --behaviour organism --auto-select --study-name demo-organism
	@echo "The report is in $(CURDIR)/runs/demo-organism/report.html, the saved model in runs/demo-organism/model"

# Seconds: style, types, and which module may import which.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/typecheck.py

# Write down that a folder has fewer type errors than before.
types: setup
	$(BIN)/python .ci/typecheck.py --rewrite

# The site, in build/site; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Groups begin in the order of tests/conftest.py, the longest first.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

# Everything but what needs a GPU and the long forms; about 20 minutes on two cores.
test: check
	$(PYTEST) -m "not gpu and not nightly" $(PYTEST_ARGS)

# Four minutes: no Ray cluster, no network namespaces, no browser.
test-fast: setup
	$(PYTEST) -m "not gpu and not nightly and not ray and not cluster and not browser and not slow" $(PYTEST_ARGS)

# The long forms: a thousand histories of the cluster, full load, long faults, clients in environments of their own.
test-nightly: setup $(VENV)/.installed-docs
	HISTORIES=$${HISTORIES:-1000} $(PYTEST) -m nightly $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
