# The two main targets are `run` and `test`; both set everything up in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
SEED ?= 0
SAMPLES ?= 500
CKPT ?=

.DEFAULT_GOAL := help
.PHONY: help .venv run test test-pods test-gpu-compile compile-tests lint train-micro eval-micro clean

help:
	@echo "make run     draw fresh pictures and ask the bundled model about them; SEED=7 draws others"
	@echo "make test    run the whole test suite (sets up $(VENV) first)"
	@echo "make test-pods    compile for TPU topologies, whole models included (no TPU needed; more than half an hour)"
	@echo "make test-gpu-compile   the same for H100s (no GPU needed; fetches 4 GB into .venv-gpu; a quarter of an hour)"
	@echo "make eval-micro   ask the bundled model 500 held-out questions a task (CKPT=DIR asks another)"
	@echo "make train-micro  train the bundled model from nothing, about three and a half hours; goes on where it was stopped"
	@echo "make .venv   only set up $(VENV); PYTHON=python3.12 picks another interpreter"
	@echo "make lint    ruff: lint and format check"
	@echo "make clean   remove $(VENV) and $(OUT)"

# Stamps say what is installed; a change of setup.cfg, pyproject.toml or the interpreter installs again.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(INTERPRETER)
DEMO_INSTALLED := $(VENV)/.demo-installed-$(INTERPRETER)
TRAIN_INSTALLED := $(VENV)/.train-installed-$(INTERPRETER)
TEST_INSTALLED := $(VENV)/.test-installed-$(INTERPRETER)

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; choose one with PYTHON=python3.12"; exit 1; }
	@ls $(VENV)/lib/python$(INTERPRETER)/ >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.%-installed-$(INTERPRETER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

.venv: $(INSTALLED)

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

# Every part that is complete is kept, and a stage that was stopped goes on from its last checkpoint.
train-micro: $(TRAIN_INSTALLED)
	test -d $(RUNS)/start || $(BIN)/dsvl2 micro start $(RUNS)/start
	$(BIN)/dsvl2 micro data $(RUNS)/data
	set -e; stages=$$($(BIN)/python -c "from dsvl2_jax.apps.micro.build import STAGES; print(*STAGES)"); for stage in $$stages; do $(TRAINING) $(BIN)/dsvl2 train micro-$$stage; done
	$(BIN)/dsvl2 micro ship $(RUNS) $(RUNS)/micro

eval-micro: $(DEMO_INSTALLED)
	$(BIN)/dsvl2 micro questions $(OUT)/questions --samples $(SAMPLES)
	$(BIN)/dsvl2 eval $(CKPT) $(OUT)/questions/questions-6-$(SAMPLES).jsonl

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# Each compiler in an environment of its own: with one installed, jax would look for its devices in every other run.
test-pods:
	$(MAKE) compile-tests VENV=.venv-tpu EXTRA=tpu FILES="tests/apps/plan/test_pods.py tests/apps/plan/test_planner.py tests/apps/plan/test_planner_tpu.py"

test-gpu-compile:
	$(MAKE) compile-tests VENV=.venv-gpu EXTRA=cuda FILES=tests/apps/plan/test_gpu_compile.py

# -m "" : the slow tests too.
compile-tests: $(VENV)/.compile-installed-$(INTERPRETER) $(VENV)/.$(EXTRA)-installed-$(INTERPRETER)
	$(BIN)/python -m pytest -m "" $(ARGS) $(FILES)

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-tpu .venv-gpu $(OUT)
