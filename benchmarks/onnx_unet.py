# SPDX-License-Identifier: Apache-2.0
"""Builds `pocket` in fp32, int8 and int4 and measures the three UNets side by side on this machine's CPU.

    python benchmarks/onnx_unet.py [--out benchmarks/results/onnx_unet.json]

Latencies are taken in turns (one run of each, again and again), so that a noisy machine slows all alike; read the
ratios. Memory is that of a fresh process without PyTorch.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from turbopocket.export.build import build
from turbopocket.export.components import components_of, layers_of, shapes_of
from turbopocket.export.families import load_shapes
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.quant.formats import parse_format
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.memory import measure
from turbopocket.runtimes.onnx import OnnxRunner

FORMATS = {"fp32": "fp32", "int8": "int8-g32", "int4": "int4-g32"}
ROUNDS = 60
WARM_UP = 5


def build_all(folder: Path, model: str) -> dict[str, float]:
    """Seconds of each build, artifacts in `folder/<name>`; values by absmax, since speed does not depend on them."""
    shapes = shapes_of(layers_of(components_of(load_shapes(model))))
    seconds = {}
    for name, text in FORMATS.items():
        weight_format = parse_format(text)
        pins = {layer: "fp16" for layer, shape in shapes.items() if weight_format.fits(shape) is not None}
        values = {
            "model": {"source": model},
            "compress": {"formats": [text], "fit": "absmax", "pin": pins},
            "calibrate": {"pictures": 1},
            "parity": {"pictures": 1},
        }
        start = time.monotonic()
        build(make_recipe(values, "benchmark"), folder / name, overwrite=False, progress=StageProgress())
        seconds[name] = time.monotonic() - start
    return seconds


def latencies_ms(folder: Path) -> dict[str, float]:
    """Median milliseconds of one UNet call (batch 1) per artifact, taken in turns."""
    runners = {name: OnnxRunner(folder / name, load_manifest(folder / name)) for name in FORMATS}
    inputs = unet_inputs(folder / "fp32")
    taken: dict[str, list[float]] = {name: [] for name in FORMATS}
    for round_index in range(WARM_UP + ROUNDS):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.run("unet", inputs)
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
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_unet.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds = build_all(folder, options.model)
        latency = latencies_ms(folder)
        memory = {name: asdict(measure(folder / name, "unet")) for name in FORMATS}
    result = {
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "model": options.model,
        "build_seconds": seconds,
        "unet_latency_ms": latency,
        "latency_ratio_to_fp32": {name: value / latency["fp32"] for name, value in latency.items()},
        "unet_memory": memory,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
