# SPDX-License-Identifier: Apache-2.0
"""Losses by random projections beside losses measured one layer at a time, and what plans made from them draw.

    python benchmarks/gains.py [--model pocket-turbo] [--out benchmarks/results/gains.json]

One by one means: a layer's weight is replaced by what a candidate stores, the probe's rows run through everything
behind it, and ||y - y0||² / ||y0||² is the loss; once for each candidate of each layer, and once as plans were made
before, for the smallest candidate only, with the others by their Hessian losses. Seconds are processor time of one
thread, of measuring alone: both ways stand on the same fitted candidates. PSNR is the mean over pictures of test
prompts, between the float model and the plan's weights in PyTorch.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from turbopocket.export.build.bench import Workbench, make_workbench, parity_session, with_ranges
from turbopocket.export.build.calibration import calibration_drawing
from turbopocket.export.build.planning import proposals
from turbopocket.export.build.probe import PROBE_PROMPTS, PROBE_STEPS, make_probe
from turbopocket.export.families.components import component_name
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.ground.errors import OverBudget
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor
from turbopocket.quant.layers import weight_of
from turbopocket.quant.observe import LayerStats, SecondMoment
from turbopocket.quant.plan import LayerChoices
from turbopocket.quant.row_losses import Question, RowwiseOutput, measure
from turbopocket.quant.sensitivity import compress_candidates, hessian_loss
from turbopocket.quant.workers import in_turn
from turbopocket.runtimes.compare.metrics import psnr_db

FORMATS = ("int8-row", "int4-row", "vq8-d4")
VECTORS = (1, 2, 4, 8, 16, 32)
PLANNED_VECTORS = (8,)
BUDGETS = ("8MB", "6MB", "5MB")
PICTURES = 16
Losses = dict[str, dict[str, float]]
"""By layer and format."""


def workbench(model: str, pictures: int) -> Workbench:
    """The model for ONNX, with all formats as candidates where they fit."""
    values = {
        "model": {"source": model},
        "compress": {"formats": [*FORMATS, "fp16"]},
        "parity": {"pictures": pictures},
    }
    return make_workbench(make_recipe(values, "benchmark"), (), StageProgress(), in_turn)


def one_by_one(
    bench: Workbench,
    stored: Mapping[str, Sequence[CompressedTensor]],
    outputs: Sequence[tuple[Sequence[str], RowwiseOutput]],
) -> Losses:
    """||y - y0||² / ||y0||² of each candidate of each layer, alone in the model."""
    losses: Losses = {}
    for components, output in outputs:
        rows = slice(0, output.rows)
        with torch.no_grad():
            expected = output.run(rows).to(torch.float64)
            for name, candidates in stored.items():
                if component_name(name) in components:
                    losses[name] = {}
                    for each in candidates:
                        with decompressed(bench.modules, {name: each}):
                            error = float((output.run(rows) - expected).square().sum() / expected.square().sum())
                        losses[name][str(each.format)] = error
    return losses


def projected(
    bench: Workbench,
    stored: Mapping[str, Sequence[CompressedTensor]],
    outputs: Sequence[tuple[Sequence[str], RowwiseOutput]],
    vectors: int,
) -> dict[str, LayerChoices]:
    """Choices as `build` makes them."""
    questions = []
    for components, output in outputs:
        own = {name: formats for name, formats in bench.formats.items() if component_name(name) in components}
        questions.append(Question(bench.layers, own, stored, output, vectors=vectors, seed=bench.recipe.seed))
    choices = {name: each for found in measure(questions) for name, each in found.items()}
    return {name: choices[name] for name in bench.formats}


def by_hessian(
    bench: Workbench,
    stored: Mapping[str, Sequence[CompressedTensor]],
    stats: Mapping[str, LayerStats],
    measured: Losses,
) -> Losses:
    """Losses as they were before: that of the smallest candidate, times each one's Hessian loss over its own."""
    losses: Losses = {}
    for name, candidates in stored.items():
        weight, hessian_KK = weight_of(name, bench.layers[name]).detach(), stats[name][SecondMoment].hessian_KK
        each = {str(c.format): hessian_loss(c.format.decompress(c) - weight, hessian_KK) for c in candidates}
        smallest = str(min(candidates, key=lambda one: one.format.nbytes(one.shape)).format)
        gain = measured[name][smallest] / each[smallest] if each[smallest] else 0.0
        losses[name] = {text: gain * loss for text, loss in each.items()}
    return losses


def as_losses(choices: Mapping[str, LayerChoices]) -> Losses:
    return {name: {each.scheme: each.loss for each in layer.candidates} for name, layer in choices.items()}


def as_choices(like: Mapping[str, LayerChoices], losses: Losses) -> dict[str, LayerChoices]:
    """The same candidates with other losses, where there are any."""
    return {
        name: replace(
            layer,
            candidates=tuple(
                replace(each, loss=losses.get(name, {}).get(each.scheme, each.loss)) for each in layer.candidates
            ),
        )
        for name, layer in like.items()
    }


def agreement(found: Losses, expected: Losses) -> dict[str, Any]:
    """By format, and over all: rank correlation, and log10 of found over expected."""
    rows = {}
    for text in (*FORMATS, "all"):
        pairs = [
            (found[name][each], loss)
            for name, losses in expected.items()
            for each, loss in losses.items()
            if each == text or (text == "all" and each in FORMATS)
        ]
        ratios = [np.log10(one / other) for one, other in pairs if one > 0 and other > 0]
        rows[text] = {
            "candidates": len(pairs),
            "spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic),
            "log10_ratio_median": median(ratios),
            "log10_ratio_std": float(np.std(ratios)),
            "sum_ratio": sum(one for one, _ in pairs) / sum(other for _, other in pairs),
        }
    return rows


def drawn(
    bench: Workbench,
    session: Session,
    stats: Mapping[str, LayerStats],
    choices: Mapping[str, LayerChoices],
    folder: Path,
    pictures: Sequence[Any],
) -> dict[str, Any]:
    """The plan for each budget: how many layers in each format, and PSNR on test prompts."""
    rows: dict[str, Any] = {}
    for budget in BUDGETS:
        at_budget = bench.recipe.model_copy(
            update={"compress": bench.recipe.compress.model_copy(update={"budget": budget})}
        )
        try:
            plan = proposals(replace(bench, recipe=at_budget), stats, choices, {}, folder)[0]
        except OverBudget as error:
            rows[budget] = str(error)
            continue
        weights = compress(bench.layers, plan, bench.fit(MSE), stats)
        runner = torch_runner(bench.components)
        with decompressed(bench.modules, weights):
            found = [session.draw(runner, index) for index in range(len(pictures))]
        formats = [choice.scheme for choice in plan.choices]
        rows[budget] = {
            "layers": {text: formats.count(text) for text in dict.fromkeys(formats)},
            "psnr_db": float(np.mean([psnr_db(*pair) for pair in zip(found, pictures, strict=True)])),
            "choices": formats,
        }
    return rows


def main() -> None:
    """Runs everything and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gains.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = workbench(asked.model, asked.pictures)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, folder)
        session = parity_session(bench, folder)
        runner = torch_runner(bench.components)
        stats = calibrate(bench.modules, calibration_drawing(bench, session, runner, bench.recipe.calibrate.pictures))
        bench = with_ranges(bench, stats)
        fit = bench.fit(MSE)
        stored = dict(compress_candidates(bench.layers, stats, bench.formats, fit))
        prompts = bench.evidence.prompts("measure", PROBE_PROMPTS, bench.recipe.seed)
        outputs = make_probe(replace(session, prompts=prompts).of_one_size(), bench.components, PROBE_STEPS).outputs()
        start = time.process_time()
        expected = one_by_one(bench, stored, outputs)
        seconds = {"one by one, every candidate": time.process_time() - start}
        rows: dict[str, Any] = {}
        for vectors in VECTORS:
            start = time.process_time()
            choices = projected(bench, stored, outputs, vectors)
            rows[str(vectors)] = {
                "seconds": time.process_time() - start,
                "agreement": agreement(as_losses(choices), expected),
            }
            print(vectors, json.dumps(rows[str(vectors)]), flush=True)
            rows[str(vectors)]["choices"] = choices
        before = by_hessian(bench, stored, stats, expected)
        result = {
            "machine": f"{platform.machine()}, 1 thread",
            "model": asked.model,
            "rows": {" + ".join(names): output.rows for names, output in outputs},
            "seconds": seconds,
            "by_hessian_loss": agreement(before, expected),
            "vectors": {count: {k: v for k, v in row.items() if k != "choices"} for count, row in rows.items()},
        }
        print(json.dumps(result), flush=True)
        pictures = [session.draw(runner, index) for index in range(asked.pictures)]
        plans = {
            "one by one": as_choices(choices, expected),
            "smallest and Hessian losses": as_choices(choices, before),
        }
        plans |= {f"{count} vectors": rows[str(count)]["choices"] for count in PLANNED_VECTORS}
        result["plans"] = {name: drawn(bench, session, stats, each, folder, pictures) for name, each in plans.items()}
        print(json.dumps(result["plans"]))
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
