# The commands of a developer. `make grpo` and `make test` set up what they need; both work from a clean clone.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch's CPU wheel comes from when pip's own configuration does not find one.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet --no-deps --no-compile
GPU_VENV := .venv-gpu
# Any Python that has the GPU stack may stand in for the environment of `make setup-gpu`.
GPU_PYTHON ?= $(GPU_VENV)/bin/python
# `nccl.m2n` needs a newer NCCL than torch brings; it lies apart and is preloaded by those who want it (docs/gpu.md).
NCCL := nvidia-nccl-cu13==2.30.7
ARGS ?=
PYTEST_ARGS ?=
# Images of Python often set it: every process would then compile all that it imports, for seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-gpu grpo grpo-moe golden test test-all test-gpu lint clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv and install the pinned CPU stack and the package

$(STAMP): requirements/torch-cpu.txt requirements/cpu.txt pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; pass PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V), but Python 3.11 or 3.12 is needed; pass PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the CPU stack into $(VENV) (about 3 GB)"
	@$(PIP_INSTALL) -r requirements/torch-cpu.txt || { \
	  echo "pip's own index has no CPU build of torch; trying $(TORCH_CPU_INDEX)"; \
	  $(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) -r requirements/torch-cpu.txt; }
	@$(PIP_INSTALL) -r requirements/cpu.txt
	@$(PIP_INSTALL) --no-build-isolation -e .
	@echo "importing it once, so that actors do not all compile it at their first start"
	@$(BIN)/python -W ignore -c 'import megatron.core.models.gpt, megatron.core.optimizer, ray, transformers; from vllm import LLM' >/dev/null
	@touch $@

setup-gpu: ## Create .venv-gpu with the CUDA stack, on a GPU host; leaves .venv alone
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; pass PYTHON=/path/to/python"; exit 1; }
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check -r requirements/gpu.txt
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --target $(GPU_VENV)/nccl "$(NCCL)"
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .

grpo: setup ## Train the dense model with GRPO (more overrides: ARGS="key=value ...")
	$(BIN)/python examples/run_grpo.py --config examples/configs/grpo_qwen3_tiny_cpu.yaml $(ARGS)

grpo-moe: setup ## Train the mixture-of-experts model with GRPO
	$(BIN)/python examples/run_grpo.py --config examples/configs/grpo_qwen3_moe_tiny_cpu.yaml $(ARGS)

golden: setup ## Refit every family over every layout (a part: ARGS="--level 0 -k qwen3"); outputs/golden/report.md
	$(BIN)/python -W ignore -m tests.golden.run $(ARGS)

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## Style, types and tests (more pytest options: PYTEST_ARGS="-k loss")
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: lint ## As test, with the slow ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: ## Tests that need GPUs, with .venv-gpu (another environment: GPU_PYTHON=python3)
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.device_count() or sys.exit("no CUDA device was found")'
	$(GPU_PYTHON) -m pytest tests/gpu $(PYTEST_ARGS)

clean: ## Remove the environment, caches and outputs
	rm -rf $(VENV) $(GPU_VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
