# demo   the main job: build .venv, install, train examples/digits.py on two Ray workers
# test   the tests          lint   ruff and mypy
# bench  the benchmarks against raw torch, Lightning and Ray Train
# soak   the long form of the fault tests
# clean  remove what was built here; runs/ and data/ stay
#
# PYTHON names the interpreter that .venv is made from: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --root-user-action=ignore

# Each set of extras has a stamp named after the contents of pyproject.toml, so a second call starts at once and a
# changed dependency installs again, whatever a clone or a checkout did to the file times.
PROJECT := $(shell cksum < pyproject.toml | cut -d' ' -f1)
STAMP = $(VENV)/installed-$(1)-$(PROJECT)

.PHONY: demo test lint bench soak clean
.DEFAULT_GOAL := demo

demo: $(call STAMP,examples)
	@echo "==> training examples/digits.py on two Ray workers"
	$(VENV)/bin/python examples/digits.py $(ARGS)

test: $(call STAMP,dev)
	@echo "==> running the tests, two at a time, the long ones first"
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(call STAMP,dev)
	@echo "==> ruff: style and likely mistakes"
	$(VENV)/bin/python -m ruff check .
	@echo "==> mypy: types"
	$(VENV)/bin/python -m mypy

bench: $(call STAMP,dev)
	@echo "==> running the benchmarks; the machine should have nothing else to do"
	$(VENV)/bin/python -m benchmarks $(ARGS)

soak: $(call STAMP,dev)
	@echo "==> running the long fault tests"
	$(VENV)/bin/python -m pytest -m soak --timeout 0 $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed-%-$(PROJECT): | $(VENV)/bin/pip
	@echo "==> installing raylight[$*] into $(VENV) (with PyTorch about 6 GB; the first time takes a few minutes)"
	$(PIP) --editable ".[$*]"
	@touch $@

# Debian's python3 lacks ensurepip where python3-venv is not installed; pip can then install itself.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "raylight needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
	    exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --disable-pip-version-check --python $(VENV)/bin/python install --quiet pip; }
