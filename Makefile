.PHONY: quickstart core test test-slow test-long check docs format install bench bench-learning conformance

PYTHON ?= python3
# Where torch is taken from; empty: the registry that pip is set up for. The builds for a CPU alone, which
# are smaller by gigabytes: make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV ?= .venv
BIN = $(VENV)/bin

core: $(VENV)/.core

# The package and what it depends on, without extras: what a run needs.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

install: $(VENV)/.installed

# With what tests, linters and extras need beside it.
$(VENV)/.installed: $(VENV)/.core
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: core
	$(BIN)/quartet run

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow and not long"

test-long: install
	$(BIN)/pytest -m long

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-learning: install
	$(BIN)/python benchmarks/learning.py

PEERS ?= .peers

bench: install $(PEERS)/.installed
	$(BIN)/python benchmarks/speed.py --peers $(PEERS)

$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)/new
	$(PYTHON) -m venv $(PEERS)/old
	$(PEERS)/new/bin/pip install --quiet -c constraints.txt torch
	$(PEERS)/old/bin/pip install --quiet -c constraints.txt torch
	$(PEERS)/new/bin/pip install --quiet -c constraints.txt trl==1.16.0 peft
	$(PEERS)/old/bin/pip install --quiet -c constraints.txt trl==1.10.0 peft requests
	touch $@

REPORTS = conformance/results
CONFORMANCE = PYTHONPATH=conformance/src OMP_NUM_THREADS=1

# The claims about losses and advantages, for Quartet and two versions of TRL, and the table of all reports. Exit code 3
# says that a claim fails, which the report of a library may.
conformance: install $(PEERS)/.installed
	$(CONFORMANCE) $(BIN)/python -m rl_conformance --library quartet --json $(REPORTS)/quartet.json
	$(CONFORMANCE) $(PEERS)/new/bin/python -m rl_conformance --library trl --json $(REPORTS)/trl-1.16.0.json || test $$? = 3
	$(CONFORMANCE) $(PEERS)/old/bin/python -m rl_conformance --library trl --json $(REPORTS)/trl-1.10.0.json || test $$? = 3
	$(CONFORMANCE) $(PEERS)/old/bin/python -m rl_conformance --library trl-ppo --json $(REPORTS)/trl-ppo-1.10.0.json || test $$? = 3
	$(CONFORMANCE) $(BIN)/python -m rl_conformance --into docs/conformance.md --table \
	  $(REPORTS)/quartet.json $(REPORTS)/trl-1.16.0.json $(REPORTS)/trl-1.10.0.json $(REPORTS)/trl-ppo-1.10.0.json \
	  $(REPORTS)/verl.json $(REPORTS)/areal.json $(REPORTS)/torchtune.json \
	  $(REPORTS)/openrlhf.json $(REPORTS)/slime.json $(REPORTS)/nemo-rl.json $(REPORTS)/skyrl.json \
	  $(REPORTS)/open-instruct.json $(REPORTS)/prime-rl.json
