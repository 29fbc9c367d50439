# Two commands on a fresh machine: `make setup`, then `make demo` or `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := $(BIN)/turbopocket

.PHONY: setup demo test test-slow check bench train-pocket test-optimum clean

setup: .venv/.installed

# The CPU build of torch is enough; pip takes it where the index offers it for this exact pin.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup
	$(RUN) build pocket --recipe demo --out build/demo --overwrite
	$(RUN) generate build/demo "a large red circle left of a small blue square on a white background" --seed 7 --out build/demo.png
	@echo "picture   build/demo.png"

test: check
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/onnx_unet.py

train-pocket: setup
	$(BIN)/python -m turbopocket.pocket.train all

clean:
	rm -rf build dist *.egg-info
