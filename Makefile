# One command per habit. `make demo` and `make test` make their environment (.venv) by themselves.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := retina_r18v1b_nasfpn_128_2@48_demo
BUILT := operator_cxx/built

# MXNet 1.9.1 wants a NumPy that only Python up to 3.11 has wheels of; the folders here are used in place.
MXNET_VENV := .venv-mxnet
MXNET_PYTHON ?= python3.11
MXNET_PACKAGES := mxnet==1.9.1 numpy==1.23.5 $(TORCH) opencv-python-headless==4.8.1.78 hotcoco pycocotools safetensors \
	pillow tqdm matplotlib pytest setuptools

# A build that found no compiler ends with status 3, having said so: what can do without goes on.
OR_NO_COMPILER := || [ $$? -eq 3 ]

# Where there are kernels, tests must not pass on plain torch in their place.
STRICT = $(shell test -e $(BUILT)/necklace_cpu.so && echo NECKLACE_OPS=compiled) \
	$(shell test -e $(BUILT)/necklace_cuda.so || echo NECKLACE_CUDA=0)

.PHONY: help env ops cuda lint types unit fuzz sanitize portable test demo bench clean mxnet mxnet-test

help:
	@echo "make env       the environment in $(VENV) (PYTHON=, TORCH= choose interpreter and torch)"
	@echo "make ops       compile the operators for this machine (python3 operator_cxx/build.py --help: settings)"
	@echo "make demo      draw a data set, train a small detector on it, test it, report, export it to ONNX"
	@echo "make test      lint, types, tests and, where there is nvcc, the CUDA kernels for all GPUs"
	@echo "make sanitize  test the compiled operators for memory errors, undefined behaviour and data races"
	@echo "make portable  run the numeric tests as other processors would: other instructions, one core and two"
	@echo "make fuzz      read many more damaged files than make test does"
	@echo "make bench     time a training step of the demo, and the operators"
	@echo "make mxnet     MXNet 1.9.1 in $(MXNET_VENV), with the operators compiled for it; make mxnet-test: its tests"
	@echo "make clean     remove $(VENV), what was compiled and caches; data and experiments stay"

env: $(VENV)/.made

$(VENV)/.made: pyproject.toml setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

ops: env
	@$(BIN)/python setup.py --quiet build_ext --inplace $(OR_NO_COMPILER)

mxnet: ops $(MXNET_VENV)/.made
	@$(MXNET_VENV)/bin/python -m operator_cxx.mxnet_ops.build

$(MXNET_VENV)/.made:
	$(MXNET_PYTHON) -m venv $(MXNET_VENV)
	$(MXNET_VENV)/bin/python -m pip install --quiet $(MXNET_PACKAGES)
	touch $@

mxnet-test:
	@if $(MAKE) --no-print-directory $(MXNET_VENV)/.made; then \
		$(MAKE) --no-print-directory mxnet && OMP_NUM_THREADS=1 $(MXNET_VENV)/bin/python -m pytest tests/mxnet; \
	else \
		echo "tests/mxnet were not run: MXNet 1.9.1 could not be installed; it needs $(MXNET_PYTHON) and its wheel"; \
	fi

cuda: env
	@$(BIN)/python operator_cxx/build.py cuda --archs all --out build/necklace_cuda.so --flag=-Werror=all-warnings \
		$(OR_NO_COMPILER)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

unit: ops
	$(STRICT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore=tests/mxnet

test: lint types unit cuda mxnet-test

fuzz: env
	NECKLACE_FUZZ=100 $(BIN)/python -m pytest tests/core/weights/test_hostile_files.py tests/core/weights/test_params_file.py \
		tests/symbol/test_json_format.py

sanitize: ops
	PYTHON=$(CURDIR)/$(BIN)/python tests/operator_cxx/sanitize.sh

portable: ops
	$(BIN)/python tests/portable.py

demo: ops
	rm -rf "experiments/$(DEMO)"
	$(BIN)/python utils/make_demo_dataset.py --out data/demo
	$(BIN)/python detection_train.py --config "config/demo/$(DEMO).py"
	$(BIN)/python detection_test.py --experiment "experiments/$(DEMO)" --draw 12 --report
	$(BIN)/python utils/plot_loss.py "experiments/$(DEMO)/log.jsonl"
	$(BIN)/python utils/export.py --experiment "experiments/$(DEMO)" --format onnx

bench: ops
	$(BIN)/python utils/benchmark_step.py --config "config/demo/$(DEMO).py"
	$(BIN)/python utils/benchmark_operators.py

clean:
	rm -rf $(VENV) $(MXNET_VENV) *.egg-info build $(BUILT) operator_cxx/*.so .mypy_cache .ruff_cache .pytest_cache
