.PHONY: quickstart test test-long check format install bench-learning

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/quartet run

test: install
	$(BIN)/pytest

test-long: install
	$(BIN)/pytest -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-learning: install
	$(BIN)/python benchmarks/learning.py
