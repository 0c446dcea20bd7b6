# make demo: set up, then segment the example scan.  make test: set up, then lint, types and tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/cadiff example -o demo
	$(BIN)/cadiff-seg demo/sub-MNI152_T1w.nii.gz -o demo/out --offline --overwrite -v

# Compiled once, not in each of the hundreds of processes that tests start.
test: export PYTHONDONTWRITEBYTECODE =
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 30

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/bench.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo
