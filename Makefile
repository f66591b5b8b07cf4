# make demo   sets up .venv, trains a flow, a PixelCNN and a WGAN-GP beside plain PyTorch, writes tables and pictures
# make test   sets up .venv and runs the tests, a worker a core
# make slow   the slow tests that make test leaves out (training runs, several processes, emulated GPUs, lower instruction sets),
#             and the Triton kernels in Triton's interpreter
# make lint   ruff and mypy
# make peers  the test suites of zuko, nflows and normflows, plain and with genfast.accelerate
# make sanitize  the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, built for one instruction set;
#                 ARGS=--quick for a selection, ARGS="tests/ops/test_nade.py" for tests by name
# make gpu-check  on a machine with a CUDA GPU, nvcc and PyTorch: builds in place, verifies, tests, sanitizes, measures; with
#                 $(PYTHON) as it is, nothing downloaded; ARGS="--parts verify,tests --minutes 4" for some of it
# make clean  removes what the others made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml requirements/torch.txt requirements/peers.txt

.PHONY: demo test slow lint peers sanitize gpu-check clean check-tools

demo: $(VENV)/.installed
	$(BIN)/genfast demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

# The interpreter is chosen when triton is first imported, and nothing can be compiled in such a process.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow
	env -u GENFAST_BACKEND TRITON_INTERPRET=1 GENFAST_INTERPRET_SOME=1 $(BIN)/python -m pytest -q -n auto tests/triton

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: $(VENV)/.installed
	$(BIN)/python -m tests.peers

sanitize: $(VENV)/.installed
	$(BIN)/python -m tests.sanitize $(ARGS)

gpu-check:
	@$(PYTHON) -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info genfast/*.so genfast/kernels .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "genfast: $(PYTHON) was not found. Install Python 3.10 to 3.13 (Debian: apt-get install python3 python3-venv python3-dev), or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "genfast: $(PYTHON) is $$($(PYTHON) --version), expected 3.10 to 3.13; name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "genfast: $(PYTHON) has no venv module. Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "genfast: $(PYTHON) has no C headers. Debian: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "genfast: no C++ compiler was found. Debian: apt-get install g++; macOS: xcode-select --install"; exit 1; }

# Order-only: the checks run each time, and make nothing stale.
$(VENV)/bin/python: | check-tools
	@echo "genfast: creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: requirements/torch.txt | $(VENV)/bin/python
	@echo "genfast: installing PyTorch"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/torch.txt
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "genfast: building the kernels and installing the package (about a minute)"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/peers.txt
	touch $@
