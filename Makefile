# Every target sets up what it needs: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test sanitize kernels test-gpu test-slow lint format bench bench-gpu tasks clean

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

kernels: setup  ## kernels interpreted, compiled for every architecture and predicted: the table of resources and errors
	$(BIN)/python -m benchmarks.kernels

test-gpu: setup  ## what needs a GPU, and the Triton tests compiled for it; says so where there is none
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pytest tests/triton_kernels --gpu

# Without the kernels that are broken on purpose, and what only compiles.
sanitize: setup  ## the CUDA C++ kernels on the CPU, emulated, under ASan and UBSan
	DIRMERGE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest --capture=sys tests/cuda --ignore tests/cuda/test_resources.py -k "not its_loss_is_seen"

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

BENCH_OPTIONS = $(if $(OPS),--ops "$(OPS)") $(if $(SHAPES),--shapes "$(SHAPES)") $(if $(DTYPES),--dtypes "$(DTYPES)") $(if $(SLOW),--slow-cases)

bench: setup  ## ops and algorithms, on a GPU where there is one; OPS=polar SHAPES=llama7b DTYPES=float16 narrow it, SLOW=1 adds what takes 30 s a call
	$(BIN)/python -m benchmarks $(BENCH_OPTIONS)

bench-gpu: setup  ## the same on a GPU; says so where there is none
	$(BIN)/python -m benchmarks --device cuda $(BENCH_OPTIONS)

tasks: setup  ## the real-task benchmark, resumed from benchmarks/results/tasks; OUT=new/folder measures all of it again (hours)
	$(BIN)/python -m benchmarks.tasks --all $(if $(OUT),--out "$(OUT)")
	$(BIN)/python -m benchmarks.tasks.widths $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build *.egg-info dirmerge/*.so .pytest_cache .mypy_cache .ruff_cache
