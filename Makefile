PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

$(VENV)/ready: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: with none installed, the other packages pull a CUDA build of many GB
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements-dev.txt
	# hqq is only compared with in tests; its setup would build CUDA code
	DISABLE_CUDA=1 $(BIN)/pip install -q --no-deps --no-build-isolation hqq==0.2.8.post1 termcolor einops
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

lint: $(VENV)/ready
	$(BIN)/ruff check hqqtensor tests
	$(BIN)/ruff format --check hqqtensor tests
	$(BIN)/mypy hqqtensor

demo: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m hqqtensor.demo
