# Each verb does its own set-up: the environment is .venv, made with $(PYTHON).
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: setup demo sandbox-m0 test test-slow aot lint clean

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

M0 := srlm_jax/sandbox/m0
sandbox-m0: .venv/.installed  ## trains the sandbox's M0 anew and puts it into the package; about 40 minutes
	$(BIN)/python -m srlm_jax.sandbox --config=configs/sandbox_m0.py --workdir=runs/m0
	$(BIN)/python -m srlm_jax.train --config=configs/sandbox_m0.py --workdir=runs/m0
	rm -rf runs/m0/hf
	$(BIN)/python -m srlm_jax.checkpoint.convert --checkpoint=runs/m0/m0/model --to_hf=runs/m0/hf
	mkdir -p $(M0)
	cp runs/m0/hf/* runs/m0/m0/model/metrics.jsonl runs/m0/m0/model/manifest.json runs/m0/m0/model/done.json $(M0)/

test: .venv/.test
	$(BIN)/python -m pytest -q -m 'not slow and not aot' -n 2 --dist loadfile --no-loadscope-reorder tests/test_loop.py tests srlm_jax

test-slow: .venv/.test  ## the tests that are too slow for every change
	$(BIN)/python -m pytest -q -m slow

aot: .venv-aot/.installed  ## the 70B programs, compiled for TPUs that are not here
	.venv-aot/bin/python -m pytest -q -s -m aot tests/test_aot.py
	.venv-aot/bin/python bench/scale.py

lint: .venv/.lint
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-aot runs build *.egg-info
