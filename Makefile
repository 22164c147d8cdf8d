# Every target sets up what it needs: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test kernels test-slow lint format bench tasks clean

setup: $(VENV)/.installed

$(VENV)/.requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(NATIVE_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: setup  ## merges real adapters of a real transformer by every method and evaluates the results
	$(BIN)/dirmerge demo

test: setup
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton_kernels
	$(BIN)/python -m pytest tests/triton_aot

kernels: setup  ## compiles the Triton kernels for every architecture, prints and writes the table of resources
	$(BIN)/python -m benchmarks.kernels

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

bench: setup  ## OPS=elect_merge narrows it
	$(BIN)/python -m pytest benchmarks --benchmark-enable $(if $(OPS),-k "$(OPS)") --benchmark-json=benchmarks/results/ops.json

tasks: setup  ## trains every fine-tune of the real-task benchmark again and evaluates every method (about an hour)
	$(BIN)/python -m benchmarks.tasks

clean:
	rm -rf $(VENV) build *.egg-info dirmerge/*.so .pytest_cache .mypy_cache .ruff_cache
