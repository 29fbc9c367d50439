# SPDX-License-Identifier: Apache-2.0
"""Sums of codebook vectors by VQDM beside residual k-means and formats of about as many bytes, in dB and seconds.

    python benchmarks/vqdm.py [--pictures 3] [--layers 1000] [--out benchmarks/results/vqdm.json]

dB is the Hessian-weighted signal to noise, 10 log10 tr(W H Wᵀ) / tr(E H Eᵀ) with H of the layer's inputs while `pocket`
draws. Layers are taken in a random order and the results written after each, so that a run that was cut short is a
fair sample. Seconds are processor time on one thread per million weights, the k-means start included.
The wide layer is made, not trained: rows of normal weights with log-normal scales, and inputs whose n-th principal
direction has energy 1 / n.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import components_of, layers_of
from turbopocket.export.families.graphs import Component
from turbopocket.export.recipe import Recipe
from turbopocket.export.targets.side_files import write_side_files
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.fit import GPTQ, MSE, VQDM, AdditiveGrid, Fit
from turbopocket.quant.fit.residual import residual_kmeans
from turbopocket.quant.fit.vqdm import Refinement, Search
from turbopocket.quant.formats import Additive, matrix_view, parse_format
from turbopocket.quant.layers import weight_of
from turbopocket.quant.observe import LayerStats, SecondMoment
from turbopocket.quant.sensitivity import hessian_loss
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import ComponentSpec, TensorSpec

FORMAT = "avq2x8-d8"
BESIDE = (
    *(("vq8-d4", MSE), ("vq8-d8", MSE), ("lut3", MSE), ("lut2", MSE), ("int4-g32", GPTQ), ("int4-row", GPTQ)),
    *(("avq2x8-d8", MSE), ("avq2x8-d8", VQDM), ("avq3x8-d8", MSE), ("avq3x8-d8", VQDM)),
)
BESIDE_LAYERS = 6
WIDE = 1280
ORIENTATION = {
    "authors_code_seconds_per_million": {"2 codebooks": [75, 171], "3 codebooks": [110, 252]},
    "authors_code_db": {"2 codebooks": [17.3, 17.3], "3 codebooks": [22.2, 22.6]},
    "authors_code_db_over_residual_kmeans": [5.0, 6.5],
    "on": "trained Linear layers of 384 columns, two idle cores; not these layers",
}


def calibrated(model: LoadedModel, pictures: int, seed: int) -> tuple[dict[str, Tensor], dict[str, LayerStats]]:
    """Weights and statistics of every layer that runs while the float model draws its calibration prompts."""
    components = components_of(model)
    draft = pipeline_manifest(model, Recipe(), {component.name: spec_of(component) for component in components}, ())
    with tempfile.TemporaryDirectory() as folder:
        write_side_files(model, {component.name: component for component in components}, draft.image.size, Path(folder))
        tokenizers = open_tokenizers(Path(folder), draft)
    session = Session(draft, tokenizers, evidence_for(model).prompts("calibrate", pictures, seed), seed)
    runner = torch_runner(components)
    modules = {component.name: component.module.model for component in components}
    stats = calibrate(modules, lambda: [session.draw(runner, index) for index in range(pictures)])
    layers = layers_of(components)
    return {name: weight_of(name, layers[name]).detach() for name in stats}, stats


def spec_of(component: Component) -> ComponentSpec:
    """What a manifest would say of the component; nobody reads the outputs' shapes here."""
    inputs = [
        TensorSpec(name=name, dtype="int64" if tensor.dtype == torch.int64 else "float32", shape=list(tensor.shape))
        for name, tensor in component.example_inputs.items()
    ]
    outputs = [TensorSpec(name=name, dtype="float32", shape=[1]) for name in component.output_names]
    return ComponentSpec(file=f"{component.name}/none", inputs=inputs, outputs=outputs)


def measured(text: str, fit: Fit, weight: Tensor, hessian_KK: Tensor) -> dict[str, float]:
    """dB, processor seconds and bytes of a weight in that format."""
    form = parse_format(text)
    start = time.process_time()
    compressed = form.compress(weight, fit, hessian_KK)
    seconds = time.process_time() - start
    loss = hessian_loss(form.decompress(compressed) - weight, hessian_KK)
    signal = hessian_loss(weight, hessian_KK)
    return {"db": 10 * math.log10(signal / loss), "seconds": seconds, "bits": 8 * compressed.nbytes / weight.numel()}


def both(weight: Tensor, hessian_KK: Tensor, unseen_KK: Tensor) -> dict[str, Any]:
    """Residual k-means and VQDM in FORMAT, also by the Hessian of pictures that the fit has not seen."""
    row: dict[str, Any] = {"shape": list(weight.shape)}
    form = parse_format(FORMAT)
    for name, fit in (("kmeans", MSE), ("vqdm", VQDM)):
        start = time.process_time()
        error = form.decompress(form.compress(weight, fit, hessian_KK)) - weight
        row["seconds"] = time.process_time() - start
        for judged, judge_KK in (("db", hessian_KK), ("unseen_db", unseen_KK)):
            loss = hessian_loss(error, judge_KK)
            row[f"{name}_{judged}"] = 10 * math.log10(hessian_loss(weight, judge_KK) / loss)
    return row


def summary(rows: list[dict[str, Any]], of: int) -> dict[str, Any]:
    """What the layers come to; every layer counts alike in dB, every weight in seconds."""
    gains = [row["vqdm_db"] - row["kmeans_db"] for row in rows]
    unseen = [row["vqdm_unseen_db"] - row["kmeans_unseen_db"] for row in rows]
    weights = sum(math.prod(row["shape"]) for row in rows)
    return {
        "layers_measured": len(rows),
        "layers_that_fit": of,
        "share_below_residual_kmeans": sum(gain > 0 for gain in gains) / len(rows),
        "gain_db": dict(zip(("least", "median", "most"), np.quantile(gains, [0, 0.5, 1]), strict=True)),
        "share_below_residual_kmeans_unseen": sum(gain > 0 for gain in unseen) / len(rows),
        "gain_unseen_db": dict(zip(("least", "median", "most"), np.quantile(unseen, [0, 0.5, 1]), strict=True)),
        "vqdm_db_median": float(np.median([row["vqdm_db"] for row in rows])),
        "seconds_per_million": sum(row["seconds"] for row in rows) / weights * 1e6,
    }


def wide_layer() -> tuple[Tensor, Tensor]:
    """A weight and Hessian [1280, 1280], see above."""
    random = torch.Generator().manual_seed(0)
    scale_O1 = (0.3 * torch.randn(WIDE, 1, generator=random)).exp() / WIDE**0.5
    weight_OK = scale_O1 * torch.randn(WIDE, WIDE, generator=random)
    basis_KK = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=random)).Q
    strength_K = 1 / torch.arange(1, WIDE + 1)
    return weight_OK, (basis_KK * strength_K) @ basis_KK.T


def profiled(weight_OK: Tensor, hessian_KK: Tensor) -> dict[str, float]:
    """Share of the processor time that each part of the fit takes."""
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.process_time()
            result = call(*arguments)
            spent[name] = spent.get(name, 0.0) + time.process_time() - start
            return result

        return run

    form = parse_format(FORMAT)
    assert isinstance(form, Additive)
    grid = AdditiveGrid(form.count, form.bits, form.length)
    start = timed("residual k-means", residual_kmeans)(weight_OK, grid, hessian_KK)
    fitted = Refinement(weight_OK, hessian_KK, start, Search())
    for name in ("improve_codes", "improve_codebooks", "improve_scales"):
        setattr(fitted, name, timed(name, getattr(fitted, name)))
    fitted.run()
    return {name: seconds / sum(spent.values()) for name, seconds in spent.items()}


def main() -> None:
    """Measures, and writes the JSON after every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vqdm.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "model": "pocket",
        "format": FORMAT,
        "pictures": options.pictures,
        "torch": torch.__version__,
    }
    result["for_orientation"] = ORIENTATION

    def write(part: str, value: Any) -> None:
        result[part] = value
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    model = load("pocket")
    weights, stats = calibrated(model, options.pictures, seed=0)
    _, unseen = calibrated(model, options.pictures, seed=7)
    fitting = [name for name, weight in weights.items() if parse_format(FORMAT).fits(tuple(weight.shape)) is None]
    order = [fitting[index] for index in np.random.default_rng(0).permutation(len(fitting))]
    hessians = {name: stats[name][SecondMoment].hessian_KK for name in fitting}
    large = sorted((n for n in order if n.startswith("unet.")), key=lambda n: -weights[n].numel())
    name = large[0]
    write("profile", {"layer": name} | profiled(matrix_view(weights[name].float()), hessians[name]))
    wide = wide_layer()
    grids = ((FORMAT, MSE), (FORMAT, VQDM), ("avq3x8-d8", VQDM))
    write("wide", {f"{text} {fit}": measured(text, fit, *wide) for text, fit in grids})
    beside: dict[str, Any] = {}
    for name in large[:: len(large) // BESIDE_LAYERS][:BESIDE_LAYERS]:
        beside[name] = {"shape": list(weights[name].shape)} | {
            f"{text} {fit}": measured(text, fit, weights[name].float(), hessians[name])
            for text, fit in BESIDE
            if parse_format(text).fits(tuple(weights[name].shape)) is None
        }
        write("beside", beside)
    rows: dict[str, Any] = {}
    for name in order[: options.layers]:
        rows[name] = both(weights[name].float(), hessians[name], unseen[name][SecondMoment].hessian_KK)
        write("layers", {"summary": summary(list(rows.values()), len(fitting)), "each": rows})
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
