# The commands of the README. Everything that they make is below .venv/, build/ and dist/.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip install --quiet --python $(PY)
export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
unexport PYTHONPATH

RELEASE := $(shell sed -n 's/.*"default": "\(.*\)".*/\1/p' requirements/releases.json)
SOURCES := setup.py pyproject.toml README.md requirements/releases.json $(shell find vllm tools -name '*.py')
STOCK := build/stock/$(RELEASE)
TINY := build/tiny/qwen3_vl
ENGINE := --dtype float32 --max-model-len 512 --max-num-batched-tokens 512 --limit-mm-per-prompt '{"image": 2, "video": 0}'

# The longest first; each folder's tests share what is costly.
FAST := $(addprefix tests/,wheel deepstack overlay parity geo3k)

NANO := benchmarks/geo3k_nano
GEO3K := --model $(NANO)/model --dataset $(NANO)/data --dtype float32 --max-model-len 512 --max-num-batched-tokens 2048 --gpu-memory-utilization 0.4 --limit-mm-per-prompt '{"image": 1, "video": 0}'

.PHONY: help wheel install parity geo3k test test-fast lint clean

help:
	@echo 'make wheel      build the fork: a vllm wheel in dist/ (VLLM_TARGET_DEVICE=cpu|cuda)'
	@echo 'make parity     compare compiled and eager, stock release and fork, on a tiny Qwen3-VL'
	@echo 'make geo3k      accuracy on Geo3K-nano: Transformers, vLLM eager, stock, fork'
	@echo 'make test       lint, and all tests that need no GPU'
	@echo 'make test-fast  lint, and the tests that start no engine'

$(VENV)/tools: requirements/tools.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet uv
	$(UV) -r requirements/tools.txt
	touch $@

wheel: $(VENV)/tools
	$(PY) -m build --wheel --installer uv

dist/.cpu: $(SOURCES) | $(VENV)/tools
	rm -f dist/vllm-*cpu*.whl
	VLLM_TARGET_DEVICE=cpu $(PY) -m build --wheel --installer uv
	touch $@

# The wheel alone, from the package index: what a user gets.
$(VENV)/vllm: dist/.cpu
	$(UV) --reinstall-package vllm dist/vllm-$(RELEASE)+deepstack.*cpu*.whl
	touch $@

$(STOCK): | $(VENV)/tools
	$(PY) -m tools.releases unpack cpu $(STOCK)

$(TINY): $(VENV)/vllm tests/tiny_models.py
	$(PY) -m tests.tiny_models qwen3_vl $(TINY)
	touch $@

install: $(VENV)/vllm $(STOCK)

# The stock release diverges: that is the point, and no failure of this command.
parity: install $(TINY)
	$(PY) -m tools.parity --model $(TINY) $(ENGINE) --side-by-side --vllm $(STOCK) --json build/parity/stock.json || test $$? -eq 1
	$(PY) -m tools.parity --model $(TINY) $(ENGINE) --side-by-side --json build/parity/fork.json || test $$? -eq 1
	$(PY) -m tools.parity.report build/parity/stock.json build/parity/fork.json

geo3k: install
	$(PY) -m benchmarks.geo3k $(GEO3K) --runs eager transformers compiled@$(STOCK) compiled --output-dir build/geo3k/cpu
	$(PY) -m benchmarks.geo3k $(GEO3K) --runs transformers --blank-images --output-dir build/geo3k/blank

lint: $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-fast: lint install
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not engine and not gpu' $(FAST) tests

test: test-fast
	$(PY) -m pytest -m 'engine and not gpu'

clean:
	rm -rf build dist
