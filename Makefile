# Two commands set everything up: `make demo` and `make test`. Both need git, make and Python 3.11 or newer.
# check: lint, types and the quick tier of the tests. test: all of it. docs: the site. dist: what is uploaded.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One thread in each process of the tests: as many processes as cores share them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: demo check quick test lint docs dist clean

demo: .venv/demo.stamp
	$(BIN)/latticode demo --out runs/demo

check: .venv/dev.stamp
	+$(MAKE) --no-print-directory --jobs 2 --output-sync=target TYPED=src lint quick

quick: .venv/dev.stamp
	$(PYTEST) --quick

test: .venv/dev.stamp lint
	$(PYTEST) --dist worksteal --durations=15

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python $(TYPED)

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The source, a wheel of this platform and the pure one. A release takes its wheels from .github/workflows/wheels.yml.
dist: .venv/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build --quiet
	LATTICODE_NATIVE=0 $(BIN)/python -m build --quiet --wheel
	$(BIN)/python -m twine check --strict dist/*

# torch first and alone: its release is pinned, so that nothing else chooses a build of it.
.venv/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latticode needs Python 3.11 or newer")'
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml setup.py
	$(INSTALL) -c constraints.txt -e '.[train]'
	touch $@

.venv/dev.stamp: .venv/demo.stamp
	$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs.stamp: .venv/dev.stamp
	$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist site
