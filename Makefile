# One command per habit. `make demo` and `make test` make their environment (.venv) by themselves.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := retina_r18v1b_nasfpn_128_2@48_demo

.PHONY: help env lint types unit test demo bench clean

help:
	@echo "make env     the environment in $(VENV) (PYTHON=, TORCH= choose interpreter and torch)"
	@echo "make demo    draw a data set, train a small detector on it, test it, draw what it finds"
	@echo "make test    lint, types and tests"
	@echo "make bench   time a training step of the demo"
	@echo "make clean   remove $(VENV) and caches; data and experiments stay"

env: $(VENV)/.made

$(VENV)/.made: pyproject.toml setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

unit: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: lint types unit

demo: env
	rm -rf "experiments/$(DEMO)"
	$(BIN)/python utils/make_demo_dataset.py --out data/demo
	$(BIN)/python detection_train.py --config "config/demo/$(DEMO).py"
	$(BIN)/python detection_test.py --config "config/demo/$(DEMO).py" --draw 12
	$(BIN)/python utils/plot_loss.py "experiments/$(DEMO)/log.jsonl"

bench: env
	$(BIN)/python utils/benchmark_step.py --config "config/demo/$(DEMO).py"

clean:
	rm -rf $(VENV) *.egg-info build .mypy_cache .ruff_cache .pytest_cache
