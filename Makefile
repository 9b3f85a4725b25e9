# Everything is installed into .venv and written under work_dirs; remove both to start anew.
PYTHON ?= python3
QUICK ?= 0
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint

help:
	@echo 'make setup           install everything into $(VENV), in the versions of constraints.txt'
	@echo 'make demo            FP32 Mask R-CNN to 4 bits on generated images (up to 15 minutes on two cores)'
	@echo 'make demo QUICK=1    the same path in a minute and a half, with figures that mean nothing'
	@echo 'make test            run the tests; ARGS="-m slow" or any other pytest arguments, WORKERS=4 at a time'
	@echo 'make lint            ruff and mypy, as pre-commit runs them'
	@echo 'PYTHON=python3.10    the interpreter of a new environment, 3.10 to 3.12 (now: $(PYTHON))'

setup: $(STAMP)

# mmcv-lite is mmcv without its compiled operators; a compiled mmcv that is there already stays.
# opencv-python needs libGL; where the machine has none, its headless build holds the same module.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	    "Python %d.%d is not 3.10 to 3.12: name another with make PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'setuptools<82'
	@$(BIN)/python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("mmcv"))' || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mmcv-lite
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[detection,fgvc,deploy,dev]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	        --force-reinstall --no-deps opencv-python-headless
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

# Most of a test's time is spent on one core, in the interpreter.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
