# Two commands: `make demo` and `make test`. Both build .venv from requirements/ when it changed, and nothing else.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-deps --require-hashes

# The base of the demo; BASE=mpnet measures one iteration at RoBERTa's size instead, and downloads 400 MB.
BASE ?= minilm
DEMO_minilm := demo
DEMO_mpnet := benchmarks.iteration

.PHONY: demo test lint check coverage clean

demo: $(STAMP)
	$(BIN)/python -m $(or $(DEMO_$(BASE)),$(error BASE must be minilm or mpnet, got $(BASE)))

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# What CI runs: style, types, the default tests (one whole iteration on two-layer models is among them).
check: lint test

# The default tests again, with the lines that they run counted.
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

# Every file is checked against its hash. Where pip finds a CPU-only torch it takes that, elsewhere PyPI's with CUDA.
$(STAMP): requirements/dev.txt requirements/torch.txt requirements/torch-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hubfusion needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements/torch-cpu.txt 2>/dev/null || $(INSTALL) -r requirements/torch.txt
	$(INSTALL) -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	touch $(STAMP)

clean:
	rm -rf $(VENV) .cache demo-run work
