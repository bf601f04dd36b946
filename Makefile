# The two main targets are `run` and `test`; both set everything up in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.DEFAULT_GOAL := help
.PHONY: help .venv run test lint bench-convert clean

help:
	@echo "make run     answer two questions about two bundled pictures (sets up $(VENV) first)"
	@echo "make test    run the whole test suite (sets up $(VENV) first)"
	@echo "make .venv   only set up $(VENV); PYTHON=python3.12 picks another interpreter"
	@echo "make lint    ruff: lint and format check"
	@echo "make clean   remove $(VENV) and $(OUT)"

# Stamps say what is installed; a change of setup.cfg, pyproject.toml or the interpreter installs again.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(INTERPRETER)
TEST_INSTALLED := $(VENV)/.test-installed-$(INTERPRETER)

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; choose one with PYTHON=python3.12"; exit 1; }
	@ls $(VENV)/lib/python$(INTERPRETER)/ >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

.venv: $(INSTALLED)

# The recipe is what a user would type; a converted model that is there already is kept.
run: $(INSTALLED)
	@mkdir -p $(OUT)
	@test -d $(OUT)/micro || { set -x; $(BIN)/dsvl2 convert configs/micro $(OUT)/micro; }
	$(BIN)/dsvl2 generate $(OUT)/micro --image configs/images/night.png --prompt "What colour is the star?"
	$(BIN)/dsvl2 generate $(OUT)/micro --image configs/images/meadow.png \
		--prompt "<|ref|>the yellow circle<|/ref|>" --draw $(OUT)/boxes.png

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OUT)
