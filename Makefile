# Each verb does its own set-up: the environment is .venv, made with $(PYTHON).
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: setup demo test test-slow lint clean

setup: .venv/.installed

.venv/.installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

.venv/.lint: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check 'ruff>=0.14,<0.18'
	touch $@

demo: .venv/.installed  ## the whole loop, M0 to M3, in a small world, on this machine
	$(BIN)/python -m srlm_jax.loop --size=tiny --workdir=$(RUN)

test: .venv/.test
	$(BIN)/python -m pytest -q -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder tests/test_loop.py tests srlm_jax

test-slow: .venv/.test  ## the tests that are too slow for every change
	$(BIN)/python -m pytest -q -m slow

lint: .venv/.lint
	$(BIN)/ruff check .

clean:
	rm -rf .venv runs build *.egg-info
