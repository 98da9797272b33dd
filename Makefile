# Every target sets up what it needs: a virtual environment in .venv, the development
# requirements, and the compiled CPU kernel. The machine provides Python >= 3.10, a C++
# compiler and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help build test check test-all demo bench gpu lint clean

help:
	@echo "make test    run the tests: about 5 minutes on 2 cores"
	@echo "make check   run the core of them: about a minute"
	@echo "make test-all   run the tests and the expensive sweeps"
	@echo "make demo    equivalence, gradients and speed on this machine, then a short training"
	@echo "make bench   full benchmark: csv, figures and table under benchmarks/results/"
	@echo "make gpu     tests and benchmark on a GPU, with the Python that has torch and Triton"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove what was built (keeps $(VENV))"

$(VENV)/.requirements: requirements-dev.txt
	@echo "==> $(VENV): installing the development requirements (minutes, the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml $(wildcard csrc/*)
	@echo "==> compiling the CPU kernel"
	@$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/.built

# One worker for each core; what is left of one worker's share, another takes over.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: build
	@echo "==> tests (about 5 minutes on 2 cores; make check for the core in one)"
	@$(PYTEST)

check: build
	@echo "==> core tests, on the path that users of this machine get"
	@$(PYTEST) -m core --path native

test-all: test
	@echo "==> expensive sweeps"
	@$(PYTEST) -m sweep

demo: build
	@echo "==> demo: equivalence, gradients, speed"
	@$(BIN)/python -m benchmarks.demo
	@echo "==> demo: a grapheme-to-phoneme model learns"
	@$(BIN)/python examples/g2p/train.py --demo

bench: build
	@echo "==> benchmark (an hour or so; python -m benchmarks.run --quick for one minute)"
	@$(BIN)/python -m benchmarks.run
	@$(BIN)/python -m benchmarks.plot
	@$(BIN)/python -m benchmarks.table

gpu:
	@PYTHON=$(PYTHON) tools/gpu_check.sh

lint: build
	@echo "==> lint"
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	@rm -rf build dist *.egg-info additive_attn/_C*.so $(VENV)/.built
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
