# Every target makes the virtual environment that it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_NOTEBOOKS := $(VENV)/.installed-for-notebooks
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test suite check lint docs bench bench-quick notebooks lab-notebook figures dist try-wheel clean

# the main job: all first-order methods race on real data
demo: $(INSTALLED)
	$(BIN)/gradxform run digits_race

# tests with doctests, then the linters and the type checker
test: suite
	$(MAKE) check

# neighbouring tests run in the same process, where they share what is compiled
suite: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy

# the checks above, and known vulnerabilities of the pinned packages
lint: check
	$(BIN)/python tests/audit.py

# the documentation site, in docs/_build/html; warnings are errors
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.lab
	$(BIN)/python -m benchmarks.solvers
	$(BIN)/python -m benchmarks.minimize
	$(BIN)/python -m benchmarks.datasets
	$(BIN)/python -m benchmarks.fitting
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.nets
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.accelerator

# tiny forms of two benchmarks, to see that they work
bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.fitting --quick
	$(BIN)/python -m benchmarks.accelerator --quick

# run all notebooks; the first error or warning ends the run
notebooks: $(INSTALLED)
	$(BIN)/python notebooks/execute.py

# JupyterLab with the six notebooks; Ctrl-C stops it
lab-notebook: $(INSTALLED_FOR_NOTEBOOKS)
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks $(JUPYTER_OPTIONS)

# draw the README's figures
figures: $(INSTALLED)
	$(BIN)/python notebooks/figures.py

# wheel and source archive; with URL=https://… the packaged README links to the repository's files there
dist: $(INSTALLED)
	rm -rf dist
	GRADXFORM_FILES_URL=$(URL) $(BIN)/python -m build --outdir dist

# what users get: the wheel in an environment of its own, used from an empty folder on any interpreter:
# make try-wheel PYTHON=python3.13 VENV=.venv-wheel
try-wheel:
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --constraint constraints.txt "$$(ls dist/gradxform-*.whl)[test]"
	tests/try_wheel.sh $(abspath $(BIN))

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
	rm -rf $(VENV) dist
