# The commands of the README. Everything that they make is below .venv/, build/ and dist/.
PYTHON ?= $(shell command -v python3.11 || echo python3)

DEFAULT := $(shell sed -n 's/.*"default": "\(.*\)".*/\1/p' requirements/releases.json)
RELEASE ?= $(DEFAULT)

VENV := $(if $(filter $(DEFAULT),$(RELEASE)),.venv,build/env/$(RELEASE))
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip install --quiet --python $(PY)
# The GPU tests of a model or data set of the hub fetch it.
export HF_HUB_OFFLINE ?= $(if $(GEO3K_MODEL)$(GEO3K_DATASET),0,1)
export VLLM_CPU_KVCACHE_SPACE ?= 1
unexport PYTHONPATH

FORK := $(shell sed -n 's/^__version__ = "\(.*\)".*/\1/p' tools/overlay/__init__.py)
BUILD := VLLM_RELEASE=$(RELEASE) .venv/bin/python -m build --wheel --installer uv
SOURCES := setup.py pyproject.toml README.md requirements/releases.json $(shell find vllm tools -name '*.py')
STOCK := build/stock/$(RELEASE)
TINY := build/tiny/qwen3_vl
PARITY := build/parity/$(RELEASE)
ENGINE := --dtype float32 --max-model-len 512 --max-num-batched-tokens 512 --limit-mm-per-prompt '{"image": 2, "video": 0}'

# The longest first; each folder's tests share what is costly.
FAST := $(addprefix tests/,deepstack wheel pull_request overlay parity speed geo3k)

NANO := benchmarks/geo3k_nano
GEO3K := --model $(NANO)/model --dataset $(NANO)/data --dtype float32 --max-model-len 512 --max-num-batched-tokens 2048 --gpu-memory-utilization 0.4 --limit-mm-per-prompt '{"image": 1, "video": 0}'

# For a GPU: the CUDA wheel, made here or at hand in dist/, in an environment of its own.
CUDA := build/cuda/$(RELEASE)
GPU := build/env/cuda-$(RELEASE)
GPU_PY := $(GPU)/bin/python
TESTS := tests
FIGURES = build/figures/$(RELEASE)$(if $(BITES),-as-released).json
SPEED := benchmarks.speed
SERVING = -m $(SPEED).serving --model qwen3_vl_8b --vllm stock=$(CUDA)/stock fork=$(CUDA)/fork \
	--gpu-memory-utilization 0.1 --kv-cache-memory-bytes 8589934592
OLD := 0.20.% 0.21.% 0.22.%
BREAKABLE := $(filter-out $(OLD) 0.23.%,$(RELEASE))
PR43617 := $(filter $(OLD),$(RELEASE))

.PHONY: help wheel install overlay pr parity geo3k bench bench-tools bench-gpu bench-staging test test-fast test-unit test-engines test-optional test-gpu test-two-gpus release pipeline lint clean

help:
	@echo 'make wheel      build the fork: a vllm wheel in dist/ (VLLM_TARGET_DEVICE=cpu|cuda)'
	@echo 'make overlay    build vllm-deepstack in dist/: patches an installed vLLM, without a clone'
	@echo 'make pr         write the pull request to vLLM: patches and text in build/pr/'
	@echo 'make parity     compare compiled and eager, stock release and fork, on a tiny Qwen3-VL'
	@echo 'make geo3k      accuracy on Geo3K-nano: Transformers, vLLM eager, stock, fork'
	@echo 'make bench      speed of the tools and, where there is a GPU, of serving'
	@echo '                (wheel, pr, parity: of another release with RELEASE=0.20.0 to 0.33.0)'
	@echo 'make test       lint, and all tests that need no GPU'
	@echo 'make test-fast  lint, and the tests that start no engine'
	@echo 'make test-gpu   the tests that need one (TESTS=tests/geo3k: of compiled and eager alone;'
	@echo '                BITES=stock, newest: on the release); test-two-gpus: those that need two'
	@echo 'make release    all wheels of all releases, in dist/'

%/tools: requirements/tools.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet uv
	$*/bin/uv pip install --quiet --python $*/bin/python -r requirements/tools.txt
	touch $@

wheel: .venv/tools
	$(BUILD)

overlay: .venv/tools
	.venv/bin/python -m build --wheel --installer uv --outdir dist tools/overlay

pr: .venv/tools
	.venv/bin/python -m tools.pull_request $(RELEASE)

# WHEEL=at-hand: what lies in dist/ is taken, and not built anew.
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

$(GPU)/vllm: dist/.cuda-$(RELEASE) $(GPU)/tools
	$(GPU)/bin/uv pip install --quiet --python $(GPU_PY) --reinstall-package vllm dist/vllm-$(RELEASE)+deepstack.$(FORK)-*.whl
	touch $@

$(STOCK): | .venv/tools
	.venv/bin/python -m tools.releases unpack $(RELEASE) cpu $@

$(TINY): tests/tiny_models.py | $(VENV)/vllm
	$(PY) -m tests.tiny_models qwen3_vl $(TINY)
	touch $@

install: $(VENV)/vllm $(STOCK)

# The stock release diverges: that is the point, and no failure of this command.
parity: install $(TINY)
	$(PY) -m tools.parity --model $(TINY) $(ENGINE) --side-by-side --vllm $(STOCK) --json $(PARITY)/stock.json || test $$? -eq 1
	$(PY) -m tools.parity --model $(TINY) $(ENGINE) --side-by-side --json $(PARITY)/fork.json || test $$? -eq 1
	$(PY) -m tools.parity.report $(PARITY)/stock.json $(PARITY)/fork.json

geo3k: install
	$(PY) -m benchmarks.geo3k $(GEO3K) --runs eager transformers compiled@$(STOCK) compiled --output-dir build/geo3k/cpu
	$(PY) -m benchmarks.geo3k $(GEO3K) --runs transformers --blank-images --output-dir build/geo3k/blank

bench: bench-tools $(if $(shell command -v nvidia-smi),bench-gpu)

bench-tools: install $(TINY)
	$(PY) -m $(SPEED).tools --tree $(STOCK) --model $(TINY) $(ENGINE) --side-by-side --output-dir build/speed

$(CUDA)/stock: | .venv/tools
	.venv/bin/python -m tools.releases unpack $(RELEASE) cuda $@

$(CUDA)/fork $(CUDA)/pr43617: | $(CUDA)/stock
	rm -rf $@.part
	cp -al $(CUDA)/stock $@.part
	.venv/bin/python -m tools.overlay apply $@.part $(if $(filter %pr43617,$@),--overlay tests/pr43617)
	mv $@.part $@

bench-gpu: $(GPU)/vllm $(CUDA)/fork
	$(GPU_PY) $(SERVING) --output-dir build/speed/$(RELEASE)
	$(if $(BREAKABLE),VLLM_USE_BREAKABLE_CUDAGRAPH=1 $(GPU_PY) $(SERVING) \
		--output-dir build/speed/$(RELEASE)-breakable)
	$(if $(PR43617),$(MAKE) bench-staging)

bench-staging: $(GPU)/vllm $(CUDA)/fork $(CUDA)/pr43617
	$(GPU_PY) -m $(SPEED).deepstack --vllm stock=$(CUDA)/stock pr43617=$(CUDA)/pr43617 \
		fork=$(CUDA)/fork --output-dir build/speed

lint: $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-unit: install
	$(PY) -m pytest --durations 20 -n 2 --dist loadfile --no-loadscope-reorder -m 'not engine and not gpu' $(FAST) tests

test-engines: install
	$(PY) -m pytest --durations 0 --durations-min 5 -m 'engine and not gpu'

test-optional: install
	$(PY) -m pytest --optional -m optional

test-fast: lint test-unit

test: test-fast test-engines

# BITES=stock (0.22.1) or newest: on the release as it is, what is said to fail there.
test-gpu: $(GPU)/vllm $(if $(BITES),$(CUDA)/stock)
	$(if $(BITES),PYTHONPATH=$(CUDA)/stock) $(GPU_PY) -m pytest -m gpu \
		$(if $(BITES),--bites $(BITES)) --figures $(FIGURES) $(TESTS)

test-two-gpus: $(GPU)/vllm
	$(GPU_PY) -m pytest -m gpu -k sharded tests/serving

release: overlay
	set -e; for device in cpu cuda; do for release in $$(.venv/bin/python -m tools.releases list $$device); do \
		$(MAKE) wheel RELEASE=$$release VLLM_TARGET_DEVICE=$$device; done; done
	cd dist && sha256sum *.whl > SHA256SUMS

pipeline: .venv/tools
	@.venv/bin/python .buildkite/pipeline.py

clean:
	rm -rf build dist
