# Each verb does its own set-up: the environment is .venv, made with $(PYTHON).
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: setup demo test test-slow aot lint clean

setup: .venv/.installed

.venv/.installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

.venv-aot/.installed: setup.py  # apart: where the TPU's library is installed, every run looks for a TPU first
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet --disable-pip-version-check -e '.[test,aot]'
	touch $@

.venv/.lint: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check 'ruff>=0.14,<0.18'
	touch $@

demo: .venv/.installed  ## the whole loop, M0 to M3, in a small world, on this machine
	$(BIN)/python -m srlm_jax.loop --size=tiny --workdir=$(RUN)

test: .venv/.test
	$(BIN)/python -m pytest -q -m 'not slow and not aot' -n 2 --dist loadfile --no-loadscope-reorder tests/test_loop.py tests srlm_jax

test-slow: .venv/.test  ## the tests that are too slow for every change
	$(BIN)/python -m pytest -q -m slow

aot: .venv-aot/.installed  ## the 70B programs, compiled for TPUs that are not here
	.venv-aot/bin/python -m pytest -q -s -m aot tests/test_aot.py

lint: .venv/.lint
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-aot runs build *.egg-info
