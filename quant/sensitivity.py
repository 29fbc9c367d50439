# SPDX-License-Identifier: Apache-2.0
"""Layers in each format that they may get, and what they lose there: kept in a file, or estimated from shapes alone.

Measuring (`row_losses`) is slow and its result is saved; deciding (`plan`) only reads it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError, of_layer
from ..ground.records import load_record, save_record
from .fit import Fit
from .formats import CompressedTensor, LayerFormat, matrix_view
from .layers import weight_of
from .observe import LayerStats, carried_for, hessian_for
from .plan import Candidate, LayerChoices, with_scheme
from .store import CandidateStore, save_weights
from .workers import Spread, in_turn

SCHEMA_VERSION = 2


def compress_candidates(
    layers: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStats],
    candidates: Mapping[str, Sequence[LayerFormat]],
    fit: Fit,
    spread: Spread = in_turn,
) -> Iterator[tuple[str, tuple[CompressedTensor, ...]]]:
    """Each layer that has a choice, as every one of its candidates stores it, in their order.

    TurbopocketError naming the layer that has no statistics, no candidate, or one that does not fit.
    """
    chosen = {name: tuple(formats) for name, formats in candidates.items() if len(formats) != 1}
    jobs = (_job(name, layers[name], stats, formats, fit) for name, formats in chosen.items())
    yield from zip(chosen, spread(_stored, jobs), strict=True)


def candidates_to_files(
    layers: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStats],
    candidates: Mapping[str, Sequence[LayerFormat]],
    fit: Fit,
    folder: Path,
    spread: Spread = in_turn,
    advance: Callable[[], None] = lambda: None,
) -> CandidateStore:
    """Like `compress_candidates`, with every layer written as soon as it is made, and read when it is asked for.

    A layer that is there in all its formats is not made again. `advance` is called after each layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = CandidateStore(folder, {name: formats for name, formats in candidates.items() if len(formats) != 1})
    missing = {name: formats for name, formats in candidates.items() if not store.has(name)}
    for _ in range(len(candidates) - len(missing)):
        advance()
    for name, tried in compress_candidates(layers, stats, missing, fit, spread):
        for each in tried:
            save_weights(store.file(name, each.format), {name: each})
        advance()
    return store


@dataclass(frozen=True)
class _Job:
    name: str
    weight: Tensor
    formats: tuple[LayerFormat, ...]
    fit: Fit
    stats: LayerStats

    def carried(self) -> "_Job":
        """The job with its statistics, for where their files are not."""
        return replace(self, stats=carried_for(self.fit, self.stats))


def _job(
    name: str, layer: nn.Module, stats: Mapping[str, LayerStats], formats: tuple[LayerFormat, ...], fit: Fit
) -> _Job:
    weight = weight_of(name, layer).detach()
    if name not in stats:
        raise TurbopocketError(f"{name}: no statistics, the layer did not run while calibrating")
    if not formats:
        raise TurbopocketError(f"{name}: no candidate format")
    return _Job(name, weight, formats, fit, stats[name])


def _stored(job: _Job) -> tuple[CompressedTensor, ...]:
    with of_layer(job.name):
        hessian = hessian_for(job.fit, job.stats)
        return tuple(each.compress(job.weight, job.fit, hessian) for each in job.formats)


def hessian_loss(error: Tensor, hessian_KK: Tensor) -> float:
    """tr[E H Eᵀ] of a weight error in the weight's own shape: mean squared change of the output."""
    error_OK = matrix_view(error)
    return max(0.0, float(((error_OK @ hessian_KK) * error_OK).sum(dtype=torch.float64)))


def estimate_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], candidates: Mapping[str, Sequence[LayerFormat]]
) -> dict[str, LayerChoices]:
    """Choices without weights: loss = numel * 4^-b, with b the stored bits per weight, scales counted.

    One bit halves the rounding step, so it quarters the squared error; every weight counts alike. Good enough
    to plan from a model's config, not to ship.
    """
    return {
        name: LayerChoices(
            name,
            shape,
            tuple(_estimate(each, each.nbytes(shape), math.prod(shape)) for each in candidates[name]),
        )
        for name, shape in shapes.items()
    }


def _estimate(layer_format: LayerFormat, nbytes: int, numel: int) -> Candidate:
    return Candidate(str(layer_format), nbytes, numel * 4.0 ** (-8 * nbytes / numel))


def save_choices(path: Path, choices: Mapping[str, LayerChoices]) -> None:
    """Writes the choices as JSON (`choices.json`), in order, whole or not at all."""
    layers = [asdict(layer) for layer in choices.values()]
    save_record(path, {"schema_version": SCHEMA_VERSION, "layers": layers})


def load_choices(path: Path) -> dict[str, LayerChoices]:
    """The choices saved at `path`; TurbopocketError naming the file when it holds something else."""
    return load_record(path, "a file of choices", SCHEMA_VERSION, _layers)


def _layers(values: dict[str, Any], schema_version: int) -> dict[str, LayerChoices]:
    layers = [_layer_from_json(entry, schema_version) for entry in values["layers"]]
    return {layer.layer: layer for layer in layers}


def _layer_from_json(entry: dict[str, Any], schema_version: int) -> LayerChoices:
    candidates = tuple(Candidate(**with_scheme(candidate, schema_version)) for candidate in entry["candidates"])
    return LayerChoices(entry["layer"], tuple(entry["shape"]), candidates, entry.get("roundings", {}))
