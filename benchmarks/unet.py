# SPDX-License-Identifier: Apache-2.0
"""Builds `pocket-turbo` in fp32, int8 and int4 for ONNX Runtime and ExecuTorch and measures the UNets side by side.

    python benchmarks/unet.py [--artifacts build/unet] [--out benchmarks/results/unet.json]

Latencies are taken in turns (one run of each, again and again), so that a noisy machine slows all alike; read the
ratios, all to ONNX Runtime's fp32. Memory is that of a fresh process without PyTorch: a bare Python with ONNX Runtime,
the C++ runner with ExecuTorch. Both runtimes may use all cores. Artifacts that are there already are measured as they
are.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from turbopocket.export.build.build import build
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.components import layers_of, shapes_of
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import TargetSection, make_recipe
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.layer import kind_of
from turbopocket.export.targets.registry import open_target
from turbopocket.quant.scheme import parse_scheme
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.open import open_runner

ONNX, EXECUTORCH = TargetSection(name="onnx"), TargetSection(name="executorch")
STATIC = TargetSection(name="executorch", executorch=ExecuTorchOptions(activations="static"))
BUILDS = {
    "onnx fp32": (ONNX, "fp32", "fp16"),
    "onnx int8": (ONNX, "int8-g32", "fp16"),
    "onnx int4": (ONNX, "int4-g32", "fp16"),
    "executorch fp32": (EXECUTORCH, "fp32", "fp32"),
    "executorch int8": (EXECUTORCH, "int8-row", "fp32"),
    "executorch int8 static": (STATIC, "int8-row", "fp32"),
    "executorch int4": (EXECUTORCH, "int4-g32", "int8-row"),
}
"""Target, format, and format of the layers that it can not store in the first."""
BASE = "onnx fp32"
ROUNDS = 60
WARM_UP = 5


def build_all(folder: Path, model: str) -> None:
    """Artifacts in `folder/<name>`, those that are missing; values by absmax, since speed does not depend on them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (section, text, otherwise) in BUILDS.items():
        target = open_target(section)
        loaded = load_shapes(model)
        shapes = shapes_of(layers_of(target.components(loaded, [loaded.image_size])))
        wanted = parse_scheme(text)
        unfit = [layer for layer, shape in shapes.items() if target.storable(wanted, kind_of(shape), shape) is not None]
        values = {
            "model": {"source": model},
            "target": section.model_dump(),
            "compress": {"formats": [text], "fit": "absmax", "pin": dict.fromkeys(unfit, otherwise)},
            "calibrate": {"pictures": 1},
            "parity": {"pictures": 1},
        }
        if not (folder / name).is_dir():
            build(make_recipe(values, "benchmark"), folder / name, overwrite=False, progress=StageProgress())


def latencies_ms(folder: Path) -> dict[str, float]:
    """Median milliseconds of one UNet call (batch 1) per artifact, taken in turns."""
    runners = {name: open_runner(folder / name, load_manifest(folder / name)) for name in BUILDS}
    inputs = {name: unet_inputs(folder / name) for name in BUILDS}
    taken: dict[str, list[float]] = {name: [] for name in BUILDS}
    for round_index in range(WARM_UP + ROUNDS):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.run("unet", inputs[name])
            if round_index >= WARM_UP:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in taken.items()}


def unet_inputs(artifact: Path) -> dict[str, Any]:
    """Random inputs of the UNet's shapes, batch 1."""
    random = np.random.default_rng(0)
    specs = load_manifest(artifact).components["unet"].inputs
    shapes = {spec.name: [size if isinstance(size, int) else 1 for size in spec.shape] for spec in specs}
    inputs: dict[str, Any] = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["timestep"] = np.full(shapes["timestep"], 500, dtype=np.float32)
    return inputs


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--artifacts", type=Path, default=Path("build/unet"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "unet.json")
    options = parser.parse_args()
    folder = options.artifacts
    build_all(folder, options.model)
    latency = latencies_ms(folder)
    memory = {
        name: asdict(open_target(section).memory(folder / name, "unet")) for name, (section, *_) in BUILDS.items()
    }
    result = {
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "model": options.model,
        "unet_latency_ms": latency,
        "latency_ratio_to_fp32": {name: value / latency[BASE] for name, value in latency.items()},
        "unet_memory": memory,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
