# SPDX-License-Identifier: Apache-2.0
"""Stores a few UNet layers of `pocket` in tables and codebooks, by ours and by coremltools' k-means, side by side.

    python benchmarks/kmeans.py [--out benchmarks/results/kmeans.json]

coremltools' k-means of vectors needs scikit-learn, which nothing else here does. Seconds are processor time per
million weights, one run each on one thread: read the ratios. Errors are relative, Σ d (ŵ - w)² / Σ d w², with d = 1
and with a d per column that is drawn once, log-normal, and that ours alone is told.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.optimize.coreml._quantization_passes import palettize_weights
from torch import Tensor

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of, layers_of
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import Codebook, Palette, matrix_view, parse_format

FORMATS = ("lut4", "lut4-r16", "lut6-r16", "vq4-d2", "vq8-d4", "vq8-d4-out-r64")
# By coremltools a codebook of 256 vectors takes 10 s and more per million weights.
MOST_WEIGHTS = 600_000


def chosen_weights(model: str) -> dict[str, Tensor]:
    """The largest Linear weights and matrix views of convolutions that all formats fit, up to MOST_WEIGHTS in all."""
    layers = {name: layer for name, layer in layers_of(components_of(load(model))).items() if name.startswith("unet.")}
    matrices = {name: matrix_view(layer.weight.detach().to(torch.float32)) for name, layer in layers.items()}
    chosen: dict[str, Tensor] = {}
    for name, weight_OK in sorted(matrices.items(), key=lambda entry: -entry[1].numel()):
        fits = all(parse_format(text).fits(tuple(weight_OK.shape)) is None for text in FORMATS)
        if fits and weight_OK.numel() + sum(map(Tensor.numel, chosen.values())) <= MOST_WEIGHTS:
            chosen[name] = weight_OK
    return chosen


def ours(text: str, weight_OK: Tensor, hessian_KK: Tensor | None) -> Tensor:
    """The weight after our format."""
    form = parse_format(text)
    return form.decompress(form.compress(weight_OK, MSE, hessian_KK))


def coremltools(text: str, weight_OK: Tensor) -> Tensor:
    """The weight after coremltools' k-means of the same bits, vector length and rows per table; it has no row scale."""
    form = parse_format(text)
    assert isinstance(form, Palette | Codebook)
    length = form.length if isinstance(form, Codebook) else 1
    # Its vectors run along the axis of its groups, the outputs: vectors of inputs are those of the transpose.
    transposed = isinstance(form, Codebook) and not form.along_outputs
    values = (weight_OK.T if transposed else weight_OK).numpy()
    rows = 0 if transposed else form.rows or 0
    params = palettize_weights.grouped_channelwise_compress(values, "KMEANS", form.bits, 0, rows, None, length)
    codes, tables = params.indices.astype(np.int64), params.lut.reshape(params.lut.shape[0], -1, length)
    group = np.arange(len(codes)) // (len(codes) // len(tables))
    stored = np.moveaxis(tables[group[:, None], codes], -1, 1).reshape(values.shape)
    return torch.from_numpy(stored.T if transposed else stored)


def measured(store: Callable[[Tensor], Tensor], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Processor seconds per million weights, and the two errors over all layers."""
    sums = np.zeros(4)
    start = time.process_time()
    stored = {name: store(weight_OK) for name, weight_OK in weights.items()}
    seconds = time.process_time() - start
    for name, weight_OK in weights.items():
        error_OK, importance_K = (stored[name] - weight_OK).square(), importance(weight_OK)
        energy_OK = weight_OK.square()
        sums += [float(part.sum()) for part in (error_OK, energy_OK, error_OK * importance_K, energy_OK * importance_K)]
    count = sum(map(Tensor.numel, weights.values()))
    return {
        "seconds_per_million": seconds / count * 1e6,
        "relative_error": sums[0] / sums[1],
        "weighted_relative_error": sums[2] / sums[3],
    }


def importance(weight_OK: Tensor) -> Tensor:
    """[K], the same for every layer of K columns."""
    return torch.randn(weight_OK.shape[1], generator=torch.Generator().manual_seed(0)).exp()


def compared(text: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Ours without and with the Hessian, coremltools', and what they come to against each other."""
    plain = measured(lambda weight_OK: ours(text, weight_OK, None), weights)
    told = measured(lambda weight_OK: ours(text, weight_OK, torch.diag(importance(weight_OK))), weights)
    theirs = measured(lambda weight_OK: coremltools(text, weight_OK), weights)
    return {
        "ours": plain,
        "ours_with_hessian": told,
        "coremltools": theirs,
        "times_as_fast": theirs["seconds_per_million"] / plain["seconds_per_million"],
        "error_ratio": plain["relative_error"] / theirs["relative_error"],
        "weighted_error_ratio": told["weighted_relative_error"] / theirs["weighted_relative_error"],
    }


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kmeans.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = chosen_weights(options.model)
    shapes = {name: list(weight_OK.shape) for name, weight_OK in weights.items()}
    result = {"model": options.model, "layers": shapes, "formats": {text: compared(text, weights) for text in FORMATS}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
