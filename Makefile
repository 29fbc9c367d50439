# Two commands on a fresh machine: `make setup`, then `make demo` or `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
RUN := $(BIN)/turbopocket

.PHONY: setup search fuzz-search demo test test-slow test-fuzz test-kills test-android check arm64 bench bench-quality \
	bench-memory bench-executorch bench-distill bench-vqdm bench-codebooks bench-gains bench-mixdq bench-allocation bench-tfmq bench-vq4dit synthetic-sdxl test-sdxl train-pocket \
	train-pocket-dit distill-pocket distill-baseline test-optimum test-clients kernels kernels-arm64 fuzz-kernels \
	clean

setup: .venv/.installed
	@$(MAKE) --no-print-directory search || echo "without it VQDM searches in PyTorch" >&2

# The CPU build of torch is enough; pip takes it where the index offers it for this exact pin.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# VQDM's search in C++, into quant/fit/native/lib. Everything works without it, several times more slowly.
SEARCH := quant/fit/native
search: $(SEARCH)/lib/.built

$(SEARCH)/lib/.built: $(SEARCH)/CMakeLists.txt $(wildcard $(SEARCH)/core/*)
	@command -v cmake >/dev/null && command -v c++ >/dev/null || { echo "make search needs CMake and a C++ compiler" >&2; exit 1; }
	cmake -S $(SEARCH) -B build/vqdm/release
	cmake --build build/vqdm/release
	cmake --install build/vqdm/release --prefix $(SEARCH)
	touch $@

# One thread: for layers this small PyTorch's threads wait for each other longer than they work.
demo: export OMP_NUM_THREADS = 1
demo: setup
	$(RUN) build --recipe demo --out build/demo --overwrite
	$(RUN) generate build/demo "a large red circle left of a small blue square on a white background" --seed 7 --out build/demo.png --overwrite
	@echo "picture   build/demo.png"

# Two processes of one thread each, for two cores; a file's tests stay together, with what they share. Files go in the
# order of tests/conftest.py, quick ones last, and not by the number of their tests.
test: export OMP_NUM_THREADS = 1
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What `make test` leaves out: minutes each, with their figures printed.
test-slow: export OMP_NUM_THREADS = 1
test-slow: setup
	$(BIN)/python -m pytest -m slow -rP

# Damaged Core ML packages, 15 times as many as in `make test` (hypothesis prints how many it ran), then damaged models and
# artifacts and hostile requests, over a thousand commands, each in a child of its own: about an hour. At last a damaged codebook
# artifact through our operators for ONNX Runtime, and 400 damaged programs through those for ExecuTorch, with AddressSanitizer and
# UndefinedBehaviorSanitizer in them.
test-fuzz: export OMP_NUM_THREADS = 1
test-fuzz: setup
	$(BIN)/python -m pytest tests/runtimes/coreml/test_coreml_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics --timeout=7200
	$(BIN)/python -m pytest tests/robustness --hypothesis-profile=long --timeout=7200 -rP
	$(BIN)/python -m pytest tests/robustness/test_sanitized.py tests/robustness/test_sanitized_executorch.py -m slow -rP

# Builds of each kind killed at 340 random moments, a test for each of the 13 builds that go on until they end; for each target,
# each state that a kill can leave of a build and of one that replaces it looked at. What was killed in which stage and what was
# found is printed.
test-kills: export OMP_NUM_THREADS = 1
test-kills: setup
	$(BIN)/python -m pytest tests/export/build/test_kills.py tests/export/build/test_recorded_builds.py -m slow -rP

# The Android app's core on a JVM, beside Python; part of `make test` as well. Says why where it is skipped.
test-android: export OMP_NUM_THREADS = 1
test-android: setup
	$(BIN)/python -m pytest -m "slow or not slow" tests/export/test_android_demo.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.typing $(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/unet.py

# What artifacts were predicted to take of memory beside what they take here; those of README's first table that are there.
bench-memory: setup
	$(BIN)/python benchmarks/memory.py --terms
	$(BIN)/python benchmarks/memory.py $(wildcard build/int8 build/demo build/codebooks build/executorch)
	$(BIN)/python benchmarks/readme_tables.py

# Folders of SDXL-Turbo's topology with weights drawn by chance, 7 GB at full width: for memory, time and file sizes.
WIDTH ?= full
synthetic-sdxl: setup
	$(BIN)/python benchmarks/synthetic_sdxl.py build/synthetic-sdxl-$(WIDTH) --width $(WIDTH)

# Builds of that folder to the end, held to memory and minutes on two cores; figures go to benchmarks/results/sdxl_builds.json.
# Each goes on where it was stopped.
SDXL := build/synthetic-sdxl-full
test-sdxl: setup
	test -d $(SDXL) || $(MAKE) synthetic-sdxl WIDTH=full
	$(BIN)/python benchmarks/sdxl_builds.py $(SDXL) --most-memory 5GB --most-minutes 45
	$(BIN)/python benchmarks/sdxl_builds.py $(SDXL) --target coreml --most-memory 10GB --most-minutes 15
	$(BIN)/python benchmarks/sdxl_builds.py $(SDXL) --fit gptq --out build/sdxl-gptq --most-memory 10GB --most-minutes 90

# VQDM beside residual k-means on every layer of pocket: about half an hour of one core.
bench-vqdm: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vqdm_search.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fit_times.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vqdm.py

# Codebooks of 2, 3 and 4 bits step by step beside scalar formats, and one block of SDXL: about an hour and a half of one core.
bench-codebooks: export OMP_NUM_THREADS = 1
bench-codebooks: setup
	$(BIN)/python benchmarks/codebooks.py
	$(BIN)/python benchmarks/sdxl_block.py
	$(BIN)/python benchmarks/executorch_codebooks.py
	$(BIN)/python benchmarks/readme_tables.py

# Predicted losses by random projections beside measuring one layer at a time: about seven minutes of one core.
bench-gains: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gains.py
	$(BIN)/python benchmarks/readme_tables.py

# MixDQ's steps one on top of the other, 500 test prompts: a quarter of an hour of one core, and goes on where it was.
bench-mixdq: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mixdq.py --prompts 500

# Mixed plans beside one format for all and two other rules, at equal bytes, on each target: ten minutes.
bench-allocation: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/allocation.py

# Ranges of activations by timestep from exported files, some minutes of one core; then temporal features under nearest and
# learned rounding, row by row: some hours of one core, and goes on where it was.
LEARNED := --pictures 16 --iterations 150 --learning-rate 0.03
bench-tfmq: export OMP_NUM_THREADS = 1
bench-tfmq: setup
	$(BIN)/python benchmarks/tfmq.py
	$(BIN)/python benchmarks/temporal.py $(LEARNED)
	$(BIN)/python benchmarks/temporal.py $(LEARNED) --folded
	$(BIN)/python benchmarks/temporal.py $(LEARNED) --model pocket --prompts 100
	$(BIN)/python benchmarks/readme_tables.py

# VQ4DiT and its rivals at 2 and 3 bits, 500 test prompts: over an hour of one core, and goes on where it was.
bench-vq4dit: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vq4dit.py
	$(BIN)/python benchmarks/readme_tables.py

# The README's quality table: 500 test prompts in ONNX Runtime, int8, about 4 bits and codebooks, against float PyTorch.
bench-quality: export OMP_NUM_THREADS = 1
bench-quality: setup
	$(RUN) build --formats int8-row,int8-g32,fp16 --budget 14MB --out build/int8 --overwrite
	$(RUN) build --recipe demo --out build/demo --overwrite
	$(RUN) build --recipe codebooks --out build/codebooks --overwrite
	$(BIN)/python benchmarks/alignment.py build/int8 build/demo build/codebooks
	$(BIN)/python benchmarks/session_options.py build/codebooks
	$(BIN)/python benchmarks/demo_pairs.py build/demo.report docs/demo_pairs.png
	$(BIN)/python benchmarks/apple_pipeline.py build/demo
	$(BIN)/python benchmarks/readme_tables.py

# The same of ExecuTorch programs, with steps of activations found while they run and chosen by calibration: seven minutes.
bench-executorch: export OMP_NUM_THREADS = 1
bench-executorch: setup
	$(RUN) build --target executorch --budget 14MB --out build/executorch --overwrite
	$(RUN) build --target executorch --budget 14MB --set target.executorch.activations=static --out build/executorch-static --overwrite
	$(BIN)/python benchmarks/alignment.py build/executorch build/executorch-static --out benchmarks/results/alignment_executorch.json
	$(BIN)/python benchmarks/readme_tables.py

# optimum-onnx needs older libraries, so it gets an environment of its own.
test-optimum: setup
	test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet torch==2.13.0 'optimum-onnx==0.1.*' 'transformers<4.58' diffusers onnxruntime
	test -d build/demo || $(MAKE) demo
	.venv-optimum/bin/python tests/compat/optimum_draws.py build/demo

# onnxruntime-node, and onnxruntime-web in Node and in headless Chromium where that is installed, by the examples of docs.
CLIENTS := build/clients
test-clients: setup
	@command -v npm >/dev/null || { echo "make test-clients needs Node with npm" >&2; exit 1; }
	mkdir -p $(CLIENTS)
	cd $(CLIENTS) && npm install --ignore-scripts --no-audit --no-fund --no-save onnxruntime-node@1.30.0 onnxruntime-web@1.30.0
	test -d build/demo || $(MAKE) demo
	test -d build/codebooks || OMP_NUM_THREADS=1 $(RUN) build --recipe codebooks --out build/codebooks
	$(BIN)/python tests/compat/clients_draw.py $(CLIENTS)/node_modules build/demo build/codebooks

# ONNX and ExecuTorch artifacts on every emulated ARM CPU.
ARM64 := $(RUN) build pocket --steps 4 --overwrite
arm64: export OMP_NUM_THREADS = 1
arm64: setup
	$(ARM64) --budget 8MB --out build/arm64/onnx
	$(ARM64) --budget 14MB --target executorch --out build/arm64/executorch
	$(ARM64) --budget 14MB --target executorch --set target.executorch.activations=static --out build/arm64/executorch-static
	$(BIN)/python benchmarks/arm64.py build/arm64/onnx build/arm64/executorch build/arm64/executorch-static

train-pocket: setup
	$(BIN)/python -m turbopocket.pocket.train all

# A transformer of PixArt's topology that draws the same scenes, with the VAE and the judge of pocket.
train-pocket-dit: export OMP_NUM_THREADS = 1
train-pocket-dit: setup
	$(BIN)/python -m turbopocket.pocket.train pocket-dit --folder build/pocket-dit --preview build/pocket-dit-preview

# The shipped student, then the baseline it has to beat: regression for as many network evaluations.
DISTILL := $(RUN) distill --recipe pocket-turbo
distill-pocket distill-baseline bench-distill: export OMP_NUM_THREADS = 1
distill-pocket: setup
	$(DISTILL) --out build/pocket-turbo

distill-baseline: setup
	$(DISTILL) --set distill.method=mse --iterations 122 --set distill.student_lr=3e-4 --out build/pocket-mse

# Students beside their teacher, and TDM with each of its devices off: over an hour of one core that has AVX-512 BF16.
bench-distill: distill-pocket distill-baseline
	$(BIN)/python benchmarks/distillation.py students build/pocket-turbo build/pocket-mse
	$(BIN)/python benchmarks/distillation.py ablations
	$(BIN)/python benchmarks/readme_tables.py

# The C++ kernels for this machine, into runtimes/kernels/lib. Everything works without them, more slowly.
HEADERS ?= build/kernels/headers
kernels:
	@command -v cmake >/dev/null && command -v c++ >/dev/null || { echo "make kernels needs CMake and a C++ compiler" >&2; exit 1; }
	test -f $(HEADERS)/onnxruntime_c_api.h || runtimes/kernels/onnxruntime/fetch_headers.sh $(HEADERS) || \
	  { echo "no ONNX Runtime headers: make kernels HEADERS=<folder with onnxruntime_c_api.h>" >&2; exit 1; }
	cmake -S runtimes/kernels -B build/kernels/release -DONNXRUNTIME_HEADERS=$(abspath $(HEADERS)) \
	  -DEXECUTORCH=$(shell $(BIN)/python -c "import importlib.util as u; s = u.find_spec('executorch'); \
	    print(*(s.submodule_search_locations if s else ()))" 2>/dev/null)
	cmake --build build/kernels/release
	cmake --install build/kernels/release --prefix runtimes/kernels

# The same for 64-bit ARM, with the compiler that `turbopocket arm64 setup` unpacked; the emulated ONNX Runtime then uses them.
CROSS_ROOT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/turbopocket/arm64/trees/host
kernels-arm64: export LD_LIBRARY_PATH = $(CROSS_ROOT)/lib/x86_64-linux-gnu:$(CROSS_ROOT)/usr/lib/x86_64-linux-gnu
kernels-arm64: export PATH := $(CROSS_ROOT)/usr/bin:$(PATH)
kernels-arm64: kernels
	cmake -S runtimes/kernels -B build/kernels/aarch64 -DONNXRUNTIME_HEADERS=$(abspath $(HEADERS)) \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DCROSS_ROOT=$(CROSS_ROOT)
	cmake --build build/kernels/aarch64
	cmake --install build/kernels/aarch64 --prefix runtimes/kernels

# A million hostile and honest layers under AddressSanitizer and UndefinedBehaviorSanitizer; another SEED, other layers.
SEED ?= 0
fuzz-kernels:
	cmake -S runtimes/kernels -B build/kernels/sanitized -DCODEBOOK_SANITIZE=ON
	cmake --build build/kernels/sanitized --target fuzz
	build/kernels/sanitized/fuzz 1000000 $(SEED)

# Searches of all shapes on every path under the same sanitizers.
fuzz-search:
	cmake -S $(SEARCH) -B build/vqdm/sanitized -DVQDM_SANITIZE=ON
	cmake --build build/vqdm/sanitized --target fuzz
	build/vqdm/sanitized/fuzz 100000 $(SEED)

clean:
	rm -rf build dist *.egg-info
