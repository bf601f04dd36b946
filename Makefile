# The two main targets are `run` and `test`; both set everything up in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
SEED ?= 0
SAMPLES ?= 500
EXAMPLES ?= 1200
CKPT ?=

.DEFAULT_GOAL := help
.PHONY: help .venv constraints run test chaos soak test-fast test-exhaustive test-newest test-fuzz fuzz test-pods test-gpu-compile compile-tests test-gpu bench-gpu gpu-python lint lint-imports docs \
	audit sbom licences train-micro eval-micro clean

help:
	@echo "make run     draw fresh pictures and ask the bundled model about them; SEED=7 draws others"
	@echo "make test    run the whole test suite (sets up $(VENV) first)"
	@echo "make test-fast    its quick files, two minutes, for work on the code"
	@echo "make test-exhaustive   the suite with further cases: every model on every mesh"
	@echo "make test-newest  the same suite in .venv-newest, with the newest release of every package"
	@echo "make test-fuzz    requests that schemathesis makes of the server's OpenAPI document, EXAMPLES=1200 of each path"
	@echo "make fuzz    broken files of every kind that is read, MINUTES=10 of them"
	@echo "make test-pods    compile for TPU topologies, whole models included (no TPU needed; more than half an hour)"
	@echo "make test-gpu-compile   the same for H100s (no GPU needed; fetches 4 GB into .venv-gpu; a quarter of an hour)"
	@echo "make test-gpu     on a machine with an NVIDIA GPU: kernels, golden outputs and gradients there"
	@echo "make bench-gpu    test-gpu and dsvl2 bench model for the three sizes in ten minutes; JSON lines in $(OUT)/gpu"
	@echo "make chaos   200 kills at random moments over every command that writes, full and failing disks; KILLS=20 FAULTS=0"
	@echo "make soak    10,000 generate calls and 5,000 training steps, whose memory must stay flat; CALLS=500 STEPS=500"
	@echo "make eval-micro   ask the bundled model 500 held-out questions a task (CKPT=DIR asks another)"
	@echo "make train-micro  train the bundled model from scratch, about three and a half hours; resumes where it was stopped"
	@echo "make .venv   only set up $(VENV); PYTHON=python3.12 picks another interpreter"
	@echo "make lint    ruff (lint and format check) and the rule of the layers (import-linter)"
	@echo "make docs    build the documentation site into $(OUT)/site; a warning is an error"
	@echo "make constraints   choose the newest releases and write them, with their hashes, to constraints/"
	@echo "make audit   ask a database of vulnerabilities about every release in constraints/; fails where one is known"
	@echo "make sbom    list what is installed in $(VENV) in $(OUT)/sbom.json (CycloneDX)"
	@echo "make licences    print the licence of every package in $(VENV)"
	@echo "make clean   remove $(VENV) and $(OUT)"

# Stamps say what is installed; a change of setup.cfg, pyproject.toml, the constraints or the interpreter installs again.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
UV_INSTALLED := $(VENV)/.uv-installed-$(INTERPRETER)
INSTALLED := $(VENV)/.installed-$(INTERPRETER)
DEMO_INSTALLED := $(VENV)/.demo-installed-$(INTERPRETER)
TRAIN_INSTALLED := $(VENV)/.train-installed-$(INTERPRETER)
TEST_INSTALLED := $(VENV)/.test-installed-$(INTERPRETER)
LINT_INSTALLED := $(VENV)/.lint-installed-$(INTERPRETER)
DOCS_INSTALLED := $(VENV)/.docs-installed-$(INTERPRETER)

# The release of every package and the hashes of its files, for the Python versions that have such a file. uv holds to
# them in an editable installation too, where pip refuses hashes.
CONSTRAINTS := $(wildcard constraints/py$(subst .,,$(INTERPRETER)).txt)
# Byte code is made once, here: a start that compiles its libraries' sources takes twice as long.
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
	$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS))

# uv reads none of pip's settings: whoever told pip of another index, or of folders with wheels, need not tell uv.
SPACE := $() $()
COMMA := ,
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(SPACE),$(COMMA),$(PIP_FIND_LINKS))
endif

$(UV_INSTALLED): constraints/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; choose one with PYTHON=python3.12"; exit 1; }
	@ls $(VENV)/lib/python$(INTERPRETER)/ >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement constraints/uv.txt
	@touch $@

$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS) $(UV_INSTALLED)
	@$(if $(CONSTRAINTS),,echo "Python $(INTERPRETER), no constraints: the newest release of every package is installed.")
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.%-installed-$(INTERPRETER): $(INSTALLED)
	$(INSTALL) --editable '.[$*]'
	@touch $@

.venv: $(INSTALLED)

# torch is left to setup.cfg, without a hash: its builds for CPUs and for GPUs have one version and different files.
LOCK := env -u UV_FIND_LINKS $(BIN)/uv pip compile --quiet --upgrade --generate-hashes \
	--custom-compile-command "make constraints" --no-emit-package torch
constraints: $(UV_INSTALLED)
	echo uv | $(LOCK) --output-file constraints/uv.txt -
	set -e; for version in 3.11 3.13; do \
		$(LOCK) --python-version $$version --all-extras \
			--output-file constraints/py$$(echo $$version | tr -d .).txt setup.cfg; \
	done

# The recipe is what a user would type; a converted model that is there already is kept.
run: $(DEMO_INSTALLED)
	@mkdir -p $(OUT)
	@test -d $(OUT)/micro || { set -x; $(BIN)/dsvl2 convert configs/micro $(OUT)/micro; }
	$(BIN)/dsvl2 demo $(OUT)/micro --seed $(SEED) --out $(OUT)

# Two virtual devices, large pages, and memory that a step frees kept for the next one: on two cores a step takes half of
# the time.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000:glibc.malloc.arena_max=1
TRAINING := JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=$(MALLOC):glibc.malloc.top_pad=268435456
RUNS := runs/micro

# Every part that is complete is kept, and a stage that was stopped resumes from its last checkpoint.
train-micro: $(TRAIN_INSTALLED)
	test -d $(RUNS)/start || $(BIN)/dsvl2 micro start $(RUNS)/start
	$(BIN)/dsvl2 micro data $(RUNS)/data
	set -e; stages=$$($(BIN)/python -c "from dsvl2_jax.apps.micro.build import STAGES; print(*STAGES)"); for stage in $$stages; do $(TRAINING) $(BIN)/dsvl2 train micro-$$stage; done
	$(BIN)/dsvl2 micro ship $(RUNS) $(RUNS)/micro

eval-micro: $(DEMO_INSTALLED)
	$(BIN)/dsvl2 micro questions $(OUT)/questions --samples $(SAMPLES)
	$(BIN)/dsvl2 eval $(CKPT) $(OUT)/questions/questions-6-$(SAMPLES).jsonl

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

NOT_COMPILED := not pods and not gpu
test-fast: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "$(NOT_COMPILED) and not exhaustive and not slow" $(ARGS)

test-exhaustive: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "$(NOT_COMPILED)" $(ARGS)

# Made anew each time, so that nothing of an earlier run is kept.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# Each compiler in an environment of its own: with one installed, jax would look for its devices in every other run.
test-pods:
	$(MAKE) compile-tests VENV=.venv-tpu EXTRA=tpu FILES="tests/apps/plan/test_pods.py tests/apps/plan/test_planner.py tests/apps/plan/test_planner_tpu.py"

test-gpu-compile:
	$(MAKE) compile-tests VENV=.venv-gpu EXTRA=cuda FILES=tests/apps/plan/test_gpu_compile.py

# -m "" : the slow tests too.
compile-tests: $(VENV)/.compile-installed-$(INTERPRETER) $(VENV)/.$(EXTRA)-installed-$(INTERPRETER)
	$(BIN)/python -m pytest -m "" $(ARGS) $(FILES)

# A Python whose jax sees a GPU and that can run the tests is taken as it is, with the package laid out by links; else one is
# set up, as make test-gpu-compile does. -P: the folder dsvl2_jax here is a part of the package alone.
GPU_OUT := $(abspath $(OUT))/gpu
SEES_GPU := import hypothesis, jax, orbax.checkpoint, pytest, tyro; raise SystemExit(jax.default_backend() != "gpu")
gpu-python:
	@mkdir -p $(GPU_OUT)/package/dsvl2_jax
	@ln -sfn $(abspath $(wildcard dsvl2_jax/*) configs convert infer train) $(GPU_OUT)/package/dsvl2_jax/
	@if $(PYTHON) -c '$(SEES_GPU)' 2>/dev/null; then \
		echo "PYTHONPATH=$(GPU_OUT)/package $(PYTHON) -P" > $(GPU_OUT)/python; \
	else \
		$(MAKE) gpu-environment VENV=.venv-gpu && echo "$(abspath .venv-gpu)/bin/python -P" > $(GPU_OUT)/python; \
	fi

gpu-environment: $(VENV)/.compile-installed-$(INTERPRETER) $(VENV)/.cuda-installed-$(INTERPRETER)

# The golden outputs are those of test_golden.py and test_loss.py, here on the GPU.
GPU_PYTHON = env JAX_COMPILATION_CACHE_DIR=$(GPU_OUT)/xla $$(cat $(GPU_OUT)/python)
GPU_TESTS := tests/kernels/test_device.py tests/test_golden.py tests/train/test_loss.py \
	-k "test_device or equal_the_official or bfloat16 or golden_ones or golden_norm"
RUN_GPU_TESTS = DSVL2_TEST_PLATFORM=cuda $(GPU_PYTHON) -m pytest -m "" $(GPU_TESTS)
test-gpu: gpu-python
	$(RUN_GPU_TESTS) $(ARGS)

# Ten minutes at most. What matters most comes first, and each part ends in time: a run that is cut off keeps its lines.
BENCH = $(GPU_PYTHON) -m dsvl2_jax bench model
LINES := $(GPU_OUT)/bench.jsonl
bench-gpu: gpu-python
	-timeout 150 $(BENCH) tiny --jobs decode,prefill,encode,train --set optimizer.state_dtype=bfloat16 --profile decode \
		--budget 130 --json >> $(LINES)
	-timeout 140 $(BENCH) small --jobs decode,prefill --profile decode --budget 120 --json >> $(LINES)
	-timeout 130 $(BENCH) base --jobs decode,prefill --slots 1,64 --budget 110 --json >> $(LINES)
	-timeout 100 env $(RUN_GPU_TESTS) > $(GPU_OUT)/tests.txt 2>&1
	-timeout 70 $(BENCH) small --jobs kernels --budget 55 --json >> $(LINES)
	@echo "$(LINES) and $(GPU_OUT)/tests.txt"

# schemathesis only sends requests: it has an environment of its own, so that it chooses no release of ours.
FUZZ := .venv-fuzz/bin/schemathesis
$(FUZZ): $(UV_INSTALLED)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(dir $(abspath $(FUZZ)))..
	$(BIN)/uv pip install --quiet --python $(dir $(FUZZ))python schemathesis

test-fuzz: $(TEST_INSTALLED) $(FUZZ)
	$(BIN)/python tests/fuzz_server.py $(abspath $(FUZZ)) $(EXAMPLES)

# What asks about packages has an environment of its own too.
AUDIT := .venv-audit
$(AUDIT)/.installed: $(UV_INSTALLED)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(AUDIT)
	$(BIN)/uv pip install --quiet --python $(AUDIT)/bin/python cyclonedx-bom pip-audit pip-licenses
	@touch $@

audit: $(AUDIT)/.installed
	@$(BIN)/python .ci/audit.py $(AUDIT)/bin/pip-audit $(wildcard constraints/*.txt)

sbom: $(AUDIT)/.installed $(INSTALLED)
	@mkdir -p $(OUT)
	$(AUDIT)/bin/cyclonedx-py environment --output-reproducible --output-file $(OUT)/sbom.json $(BIN)/python

licences: $(AUDIT)/.installed $(INSTALLED)
	@$(AUDIT)/bin/pip-licenses --python $(BIN)/python --with-urls --format=markdown

# Everything that reads a user's files, with broken ones; findings go to tests/fuzz/corpus. TARGETS="tokenizer toml" for some.
MINUTES ?= 10
fuzz: $(TEST_INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --minutes $(MINUTES) --keep $(TARGETS)

# Of the same SEED come the same kills and faults; ONLY="train convert" disturbs these commands alone.
KILLS ?= 200
FAULTS ?= 1
chaos: $(TEST_INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m chaos --kills $(KILLS) --faults $(FAULTS) --seed $(SEED) --only $(ONLY)

CALLS ?= 10000
STEPS ?= 5000
soak: $(TEST_INSTALLED)
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py generate $(CALLS)
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py train $(STEPS)

lint: $(LINT_INSTALLED) lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The layers of pyproject.toml. They hold for the package as it is installed (dsvl2_jax.convert is the folder convert/), so
# a build lays it out first, away from this folder: lint-imports looks for the package where it is started.
LAID_OUT := $(OUT)/lint
lint-imports: $(LINT_INSTALLED)
	@rm -rf $(LAID_OUT)
	@$(BIN)/python -c 'import setuptools; setuptools.setup()' --quiet build_py --build-lib $(LAID_OUT)
	cd $(LAID_OUT) && $(abspath $(BIN))/lint-imports --no-logo --no-cache $(abspath pyproject.toml)

# -W: a warning, such as a link to a page or a heading that is not there, is an error; links to the web are not followed.
docs: $(DOCS_INSTALLED)
	@rm -rf $(OUT)/site
	$(BIN)/sphinx-build --quiet -W --keep-going -c docs/site . $(OUT)/site
	@cp $(OUT)/site/README.html $(OUT)/site/index.html
	@echo "$(OUT)/site/index.html"

clean:
	rm -rf $(VENV) .venv-newest .venv-fuzz .venv-audit .venv-tpu .venv-gpu $(OUT)
