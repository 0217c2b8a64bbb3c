# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Ray starts a dozen Python processes: without cached bytecode each compiles its imports anew, half a minute a run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check setup benchmarks clean

# Modules are compiled when they are first imported, not all of them here. Set-up runs again when the pins or the
# package's own metadata change.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e .[test]
	touch $@

setup: $(VENV)/.installed-test

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/bruno-ray organism
	$(BIN)/bruno-ray run --behaviour organism --auto-select --study-name demo
	@echo "The report is in $(CURDIR)/runs/demo/report.html, the saved model with its card in runs/demo/model"

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
