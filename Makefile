# `make demo`, `make test` and `make lint` need nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint coverage oldest clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/bachvid render examples/lighthouse.yaml --config configs/storybook.yaml --out runs/lighthouse

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov

# The tests with the oldest torch that the code runs on, and all else as in constraints.txt.
oldest:
	$(PYTHON) -m venv .venv-oldest
	mkdir -p build && grep -v '^torch==' constraints.txt > build/constraints-oldest.txt
	.venv-oldest/bin/pip install --quiet --constraint build/constraints-oldest.txt "torch==2.11.*" --editable ".[dev]"
	.venv-oldest/bin/python -m pytest

clean:
	rm -rf $(VENV) .venv-oldest runs build *.egg-info
