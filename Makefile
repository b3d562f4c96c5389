# Every target makes the virtual environment that it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_NOTEBOOKS := $(VENV)/.installed-for-notebooks
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check lint bench bench-quick notebooks lab-notebook figures smoke clean

# the main job: all first-order methods race on real data
demo: $(INSTALLED)
	$(BIN)/gradxform run digits_race

# tests with doctests, then the linters and the type checker
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS)
	$(MAKE) check

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# the checks above, and known vulnerabilities of the pinned packages
lint: check
	$(BIN)/python tests/audit.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.lab
	$(BIN)/python -m benchmarks.solvers
	$(BIN)/python -m benchmarks.minimize
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.accelerator

# a tiny form of the last benchmark, to see that it works
bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.accelerator --quick

# run all notebooks; the first error or warning ends the run
notebooks: $(INSTALLED)
	$(BIN)/python notebooks/execute.py

# JupyterLab with the five notebooks; Ctrl-C stops it
lab-notebook: $(INSTALLED_FOR_NOTEBOOKS)
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks $(JUPYTER_OPTIONS)

# draw the README's figures
figures: $(INSTALLED)
	$(BIN)/python notebooks/figures.py

# import, one step of every method and the help of the command line, on any interpreter: make smoke PYTHON=python3.13 VENV=.venv313
smoke:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable ".[lab]"
	$(BIN)/python -W error tests/smoke.py
	$(BIN)/gradxform --help

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@

# only what the notebooks need, which is less than what the tests need
$(INSTALLED_FOR_NOTEBOOKS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable ".[notebooks]"
	touch $@

clean:
	rm -rf $(VENV)
