# SPDX-License-Identifier: Apache-2.0
"""Plans of equal bytes on every target: one format for all, two rivals' rules, and the program that `build` runs.

    python benchmarks/allocation.py [--model pocket-turbo] [--pictures 64] [--out benchmarks/results/allocation.json]

All rules see the same layers, the same candidates (fitted by mse) and the same losses, measured as `build` does. Bytes
are those of the layers' weights. For each format that a target has, all layers in it (those that can not be stored so
in their next larger one) are as many bytes as the other rules may spend. `threshold` is the rule of Apple's mixed-bit
palettization (ml-stable-diffusion, 2023): each layer gets its smallest format that loses no more than a threshold,
which falls until the bytes are spent. `ratio` is that of NNCF's weight compression: two neighbouring sizes, the layers
that lose least in the smaller one get it, as few as the bytes allow. PSNR is over all pictures of test prompts, between
the float model and the plan's weights in PyTorch, which the exported files agree with to their parity.
"""

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from turbopocket.export.build.bench import Workbench, make_workbench, parity_session, with_ranges
from turbopocket.export.build.calibration import calibration_drawing
from turbopocket.export.build.probe import PROBE_PROMPTS, PROBE_STEPS, make_probe
from turbopocket.export.families.components import component_name
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor
from turbopocket.quant.plan import Candidate, LayerChoices, plan
from turbopocket.quant.row_losses import Question, measure
from turbopocket.quant.sensitivity import compress_candidates
from turbopocket.quant.workers import in_turn
from turbopocket.runtimes.compare.metrics import psnr_db

FORMATS = {
    "onnx": ("vq8-d4", "int4-g32", "int8-row", "fp16"),
    "executorch": ("vq8-d4", "int4-row", "int8-row", "fp32"),
    "coreml": ("lut2", "lut4", "lut6", "int8-row", "fp16"),
}
Layers = Sequence[LayerChoices]
Chosen = dict[str, Candidate]
"""By layer."""


def by_size(layer: LayerChoices) -> list[Candidate]:
    return sorted(layer.candidates, key=lambda each: each.nbytes)


def uniform(layers: Layers, format: str) -> Chosen:
    """That format, or the next larger one that the layer has."""
    nominal = {text: index for index, text in enumerate(order(layers))}

    def one(layer: LayerChoices) -> Candidate:
        return next(each for each in by_size(layer) if nominal[each.scheme] >= nominal[format])

    return {layer.layer: one(layer) for layer in layers}


def order(layers: Layers) -> list[str]:
    """All formats by the bits that a weight takes in them in most layers."""
    bits: dict[str, list[float]] = {}
    for layer in layers:
        for each in layer.candidates:
            bits.setdefault(each.scheme, []).append(8 * each.nbytes / math.prod(layer.shape))
    return sorted(bits, key=lambda text: median(bits[text]))


def total(chosen: Chosen) -> int:
    return sum(each.nbytes for each in chosen.values())


def largest_within(budget: int, thresholds: Sequence[float], make: Callable[[float], Chosen]) -> Chosen | None:
    """Of the plans that `make` gives for thresholds, whose bytes fall as those grow, the largest one that fits."""
    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(make(thresholds[middle])) <= budget else (middle + 1, high)
    return make(thresholds[low]) if low < len(thresholds) else None


def threshold(layers: Layers, budget: int) -> Chosen | None:
    """Apple's rule."""

    def make(most: float) -> Chosen:
        return {
            layer.layer: next((each for each in by_size(layer) if each.loss <= most), by_size(layer)[-1])
            for layer in layers
        }

    return largest_within(budget, sorted({each.loss for layer in layers for each in layer.candidates}), make)


def ratio(layers: Layers, smaller: str, larger: str, budget: int) -> Chosen | None:
    """NNCF's rule."""
    small, large = uniform(layers, smaller), uniform(layers, larger)
    ranked = sorted(small, key=lambda name: small[name].loss)

    def make(count: float) -> Chosen:
        return large | {name: small[name] for name in ranked[: int(count)]}

    return largest_within(budget, range(len(ranked) + 1), make)


def program(layers: Layers, budget: int) -> Chosen:
    """What `build` does."""
    found = plan(layers, budget, 0)
    return {each.layer: Candidate(each.scheme, each.nbytes, each.loss) for each in found.choices}


class Subject:
    """A bundled model on a target: its layers' candidates with their losses, and what plans draw."""

    def __init__(self, model: str, target: str, pictures: int, folder: Path) -> None:
        values = {
            "model": {"source": model},
            "target": {"name": target},
            "compress": {"formats": list(FORMATS[target])},
            "parity": {"pictures": pictures},
        }
        bench = make_workbench(make_recipe(values, "benchmark"), (), StageProgress(), in_turn)
        bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, folder)
        self.session = parity_session(bench, folder)
        self.runner = torch_runner(bench.components)
        drawing = calibration_drawing(bench, self.session, self.runner, bench.recipe.calibrate.pictures)
        stats = calibrate(bench.modules, drawing)
        self.bench = with_ranges(bench, stats)
        self.stored = dict(compress_candidates(bench.layers, stats, bench.formats, bench.fit(MSE)))
        self.layers = list(_measured(self.bench, self.session, self.stored).values())
        self.floats = self.drawn({})

    def drawn(self, chosen: Chosen) -> Any:
        weights = {
            name: next(each for each in self.stored[name] if str(each.format) == one.scheme)
            for name, one in chosen.items()
        }
        with decompressed(self.bench.modules, weights):
            return np.stack([self.session.draw(self.runner, index) for index in range(len(self.session.prompts))])

    def row(self, chosen: Chosen) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for each in chosen.values():
            counts[each.scheme] = counts.get(each.scheme, 0) + 1
        return {
            "bytes": total(chosen),
            "predicted_loss": sum(each.loss for each in chosen.values()),
            "psnr_db": psnr_db(self.drawn(chosen), self.floats),
            "layers": counts,
        }


def _measured(
    bench: Workbench, session: Session, stored: Mapping[str, Sequence[CompressedTensor]]
) -> dict[str, LayerChoices]:
    asked = bench.evidence.prompts("measure", PROBE_PROMPTS, bench.recipe.seed)
    found: dict[str, LayerChoices] = {}
    for names, output in make_probe(
        replace(session, prompts=asked).of_one_size(), bench.components, PROBE_STEPS
    ).outputs():
        own = {name: formats for name, formats in bench.formats.items() if component_name(name) in names}
        [choices] = measure([Question(bench.layers, own, stored, output, seed=bench.recipe.seed)])
        found |= choices
    return found


def of_target(model: str, target: str, pictures: int) -> dict[str, Any]:
    """By format that stands for the bytes: the plan of each rule."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(model, target, pictures, Path(folder))
        found: dict[str, Any] = {}
        formats = order(subject.layers)
        for index, format in enumerate(formats[:-1]):
            same = uniform(subject.layers, format)
            budget = total(same)
            neighbours = (max(0, index - 1), index + 1)
            plans = {
                "uniform": same,
                "threshold": threshold(subject.layers, budget),
                "ratio": ratio(subject.layers, formats[neighbours[0]], formats[neighbours[1]], budget),
                "program": program(subject.layers, budget),
            }
            found[format] = {name: subject.row(each) for name, each in plans.items() if each is not None}
            print(target, format, json.dumps(found[format]), flush=True)
        return found


def main() -> None:
    """Runs everything and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allocation.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    targets = {target: of_target(asked.model, target, asked.pictures) for target in FORMATS}
    result = {"machine": platform.machine(), "model": asked.model, "pictures": asked.pictures, "targets": targets}
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
