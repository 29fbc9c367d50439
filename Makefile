# Two commands on a fresh machine: `make setup`, then `make demo` or `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := $(BIN)/turbopocket

.PHONY: setup demo test check bench bench-quality train-pocket test-optimum clean

setup: .venv/.installed

# The CPU build of torch is enough; pip takes it where the index offers it for this exact pin.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# One thread: for layers this small PyTorch's threads wait for each other longer than they work.
demo: export OMP_NUM_THREADS = 1
demo: setup
	$(RUN) build pocket --recipe demo --out build/demo --overwrite
	$(RUN) generate build/demo "a large red circle left of a small blue square on a white background" --seed 7 --out build/demo.png
	@echo "picture   build/demo.png"

test: check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/onnx_unet.py

# The README's quality table: 500 test prompts in ONNX Runtime, int8 and about 4 bits, against float PyTorch.
bench-quality: export OMP_NUM_THREADS = 1
bench-quality: setup
	$(RUN) build pocket --formats int8-row,int8-g32,fp16 --budget 14MB --out build/int8 --overwrite
	$(RUN) build pocket --recipe demo --out build/demo --overwrite
	$(BIN)/python benchmarks/alignment.py build/int8 build/demo
	$(BIN)/python benchmarks/demo_pairs.py build/demo.report docs/demo_pairs.png
	$(BIN)/python benchmarks/readme_tables.py

# optimum-onnx needs older libraries, so it gets an environment of its own.
test-optimum: setup
	test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet torch==2.13.0 'optimum-onnx==0.1.*' 'transformers<4.58' diffusers onnxruntime
	test -d build/demo || $(MAKE) demo
	.venv-optimum/bin/python tests/compat/optimum_draws.py build/demo

train-pocket: setup
	$(BIN)/python -m turbopocket.pocket.train all

clean:
	rm -rf build dist *.egg-info
