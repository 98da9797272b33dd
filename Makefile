# Every target sets up what it needs: a virtual environment in VENV, the development
# requirements, and the compiled CPU kernel. The machine provides Python >= 3.10, a C++
# compiler and make. TORCH_INDEX names another index for torch than pip's.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH_INDEX ?=
TORCH  := $(shell grep '^torch==' requirements-dev.txt)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# An emulator of PTX, no part of the project, beside the checkout or where ADDITIVE_ATTN_PTX says.
ADDITIVE_ATTN_PTX ?= ../shared/tools/ptx

.PHONY: help build test check test-all compiled compiled-oldest compiled-all features demo bench gpu lint clean

help:
	@echo "make test    run the tests: about 5 minutes on 2 cores, the first time 8"
	@echo "make check   run the core of them: about a minute"
	@echo "make test-all   run the tests and the expensive sweeps"
	@echo "make compiled   run the Triton kernels as compiled, where an emulator of PTX is"
	@echo "make compiled-all   the same for more tests, targets and settings"
	@echo "make features   which features run on which path and dtype: the table in docs/features.md"
	@echo "make demo    equivalence, gradients and speed on this machine, then a short training"
	@echo "make bench   benchmark: a table, and csv and figures in benchmarks/results/local/"
	@echo "make gpu     tests and benchmark on a GPU (10 minutes), with the Python that has torch"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove what make has built (keeps $(VENV))"

# Stops with the name of a Python that is too old.
old_python = import sys; sys.exit(sys.version_info < (3, 10) and "additive_attn needs Python >= \
3.10, but %s is %s. $(1)" % (sys.executable, sys.version.split()[0]))

# While VENV is being made a file beside it says so, and the next make begins again. An environment
# that was there before is not cleared.
$(VENV)/.requirements: requirements-dev.txt
	@$(PYTHON) -c '$(call old_python,Name a newer one: make PYTHON=python3.12)'
	@if [ -e $(VENV).unfinished ] || [ ! -e $(BIN)/python ]; then \
	  touch $(VENV).unfinished && $(PYTHON) -m venv --clear $(VENV); fi
	@$(BIN)/python -c '$(call old_python,Remove $(VENV) or name another one: make VENV=.venv-new)'
	@echo "==> $(VENV): installing the development requirements (minutes, the first time)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || printf '    %s\n' "$(TORCH) is the largest part: \
	0.2 GB to download for CPUs, but on Linux the default of pip also" "brings CUDA, 3 GB to \
	download and 5 GB on disk. For CPUs: make TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@[ -z "$(TORCH_INDEX)" ] || $(BIN)/pip install --quiet $(TORCH) --index-url $(TORCH_INDEX)
	@$(BIN)/pip install --quiet -r requirements-dev.txt
	@rm -f $(VENV).unfinished
	@touch $@

# Holds the name of the library, if there was none before: that is what make clean may remove.
$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
	@echo "==> compiling the CPU kernel"
	@before=$$(ls additive_attn/_C*.so 2>/dev/null); [ ! -s $@ ] || before=; \
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable . || exit; \
	if [ -n "$$before" ]; then : >$@; else ls additive_attn/_C*.so >$@ 2>/dev/null || :; fi

build: $(VENV)/.built

# One worker for each core; what is left of one worker's share, another takes over. A test that
# hangs ends its worker after the seconds below, with the stack of every thread.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal \
	-o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true

test: build
	@echo "==> tests (about 5 minutes on 2 cores, the first time 8; make check for the core in one)"
	@$(PYTEST)

check: build
	@echo "==> core tests, on the path that users of this machine get"
	@$(PYTEST) -m core --path native

test-all: test
	@echo "==> expensive sweeps"
	@$(PYTEST) -m sweep

# $(1): settings, as of the emulator (tests/emulation.py); $(2): a target, then tests.
COMPILED = @echo "==> compiled kernels in an emulator of PTX: $(1) sm_$(2)"; $(1) \
	ADDITIVE_ATTN_PTX='$(abspath $(ADDITIVE_ATTN_PTX))' $(PYTEST) --quiet --compiled $(2)
FEATURES := tests/kernels/test_compiled.py tests/kernels/test_triton.py
PLANS    := $(patsubst %,tests/kernels/test_%.py,triton_probe compiled_plans)
STEPS    := tests/kernels/test_triton_steps.py $(PLANS)
# Where approximate instructions cost most.
NOISY    := tests/kernels/test_triton.py -k '(magnitudes and 10) or (around and 150)'
CENTRE   := $(FEATURES) -k 'compiled or sizes or magnitudes or repeats'
# A kernel takes up to 10 seconds to compile. For those that are left out others stand, of another
# dtype or size; make compiled-all compiles them too.
CHOSEN   := $(FEATURES) $(STEPS) tests/layers/test_compiled_decoders.py \
	-k 'not (begins and float32) and (not test_triton_steps or (300 and (None or 17)))'
OLDEST   := $(FEATURES) -k 'compiled or repeats or (sizes and (17 or 70 or 300)) or (magnitudes and 10)'
OLDEST_TRITON := $(abspath $(VENV))/triton-3.6.0

$(OLDEST_TRITON): $(VENV)/.requirements
	@rm -rf $@.part && $(BIN)/pip install --quiet --no-deps --target $@.part triton==3.6.0
	@mv $@.part $@

ifneq ($(wildcard $(ADDITIVE_ATTN_PTX)),)
compiled: build
	$(call COMPILED,,80 $(CHOSEN))
	$(call COMPILED,PTX_BACKWARDS=1,80 $(CENTRE))
	$(call COMPILED,PTX_NOISE=1,80 $(NOISY))
	@$(MAKE) --no-print-directory compiled-oldest || { [ ! -d $(OLDEST_TRITON) ] && \
		echo "==> compiled kernels: Triton 3.6 is left out, it does not install"; }

compiled-oldest: build $(OLDEST_TRITON)
	$(call COMPILED,PYTHONPATH=$(OLDEST_TRITON),90 $(OLDEST))

compiled-all: build $(OLDEST_TRITON)
	$(call COMPILED,,80)
	$(call COMPILED,PTX_NOISE=1,80)
	$(call COMPILED,PTX_CONTRACT=1 PTX_BACKWARDS=1,90)
	$(call COMPILED,PTX_PLANS=1,80)
	$(call COMPILED,PTX_NOISE=1,80 -m sweep tests/promises/test_features.py)
	$(call COMPILED,PTX_NOISE=1 PYTHONPATH=$(OLDEST_TRITON),80 $(FEATURES) $(STEPS))
	$(call COMPILED,PYTHONPATH=$(OLDEST_TRITON),90 $(FEATURES) $(STEPS))
else
compiled compiled-oldest compiled-all:
	@echo "==> compiled kernels: left out, there is no emulator of PTX at $(ADDITIVE_ATTN_PTX)"
endif

features: build
	@echo "==> features (about 10 minutes on 2 cores)"
	@$(PYTEST) -m sweep tests/promises/test_features.py tests/distributed/test_sharded_features.py \
		--features benchmarks/results/features.csv
	@$(BIN)/python -m tools.doc_tables

demo: build
	@echo "==> demo: equivalence, gradients, speed"
	@$(BIN)/python -m benchmarks.demo
	@echo "==> demo: a grapheme-to-phoneme model learns"
	@$(BIN)/python examples/g2p/train.py --demo

bench: build
	@echo "==> benchmark (15 minutes or so; python -m benchmarks.run --quick takes one or two)"
	@$(BIN)/python -m benchmarks.run
	@$(BIN)/python -m benchmarks.plot

gpu:
	@$(PYTHON) -c 'import pytest, torch, triton, xdist' || { echo "make gpu runs with the Python that \
	has torch, Triton, pytest and pytest-xdist: make gpu PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) tools/gpu_check.py

lint: build
	@echo "==> lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

clean:
	@if [ -s $(VENV)/.built ]; then xargs rm -f <$(VENV)/.built; fi
	@rm -rf build dist *.egg-info $(VENV)/.built
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
