# SPDX-License-Identifier: Apache-2.0
"""What each layer loses in each format: measured on the model, or estimated from shapes alone.

Measuring is slow and its result is saved; deciding (plan.py) only reads it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError, of_layer
from ..ground.records import load_record, save_record
from .fit import Fit
from .formats import LayerFormat, matrix_view
from .layers import weight_of
from .observe import LayerStats, SecondMoment
from .plan import Candidate, LayerChoices, with_scheme
from .workers import Spread, in_turn

SCHEMA_VERSION = 2


def measure(
    layers: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStats],
    candidates: Mapping[str, Sequence[LayerFormat]],
    outputs: Callable[[], Sequence[Tensor]],
    fit: Fit,
    spread: Spread = in_turn,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LayerChoices]:
    """Predicted loss of every layer in each candidate format: its Hessian loss times the layer's gain.

    The Hessian loss is tr[(Ŵ - W) H (Ŵ - W)ᵀ], the mean squared error of the layer's own output. The gain
    turns it into error of the model: the layer alone is put in its smallest candidate, `outputs()` runs, and
    the mean relative squared error of what it returns is divided by that candidate's Hessian loss. Weights
    are as before when this returns. `advance` is called after each layer.
    TurbopocketError naming the layer that has no statistics, no candidate, or one that does not fit.
    """
    jobs = (_job(name, layers[name], stats, formats, fit) for name, formats in candidates.items())
    choices = {}
    with torch.no_grad():
        probe = _Probe(outputs)
        for (name, formats), fitted in zip(candidates.items(), spread(_fitted, jobs), strict=True):
            weight = weight_of(name, layers[name])
            gain = 0.0
            if fitted.smallest_loss > 0:
                with _replaced(weight, fitted.smallest):
                    gain = probe.relative_squared_error() / fitted.smallest_loss
            shape = tuple(weight.shape)
            losses = zip(formats, fitted.losses, strict=True)
            candidate = tuple(Candidate(str(each), each.nbytes(shape), gain * loss) for each, loss in losses)
            choices[name] = LayerChoices(name, shape, candidate)
            advance()
    return choices


class _Probe:
    """Runs the model and says how far its outputs are from those of the model as it was at first."""

    def __init__(self, outputs: Callable[[], Sequence[Tensor]]) -> None:
        self.outputs = outputs
        self.reference = [output.to(torch.float64, copy=True) for output in outputs()]
        self.energies = [float(output.square().sum()) for output in self.reference]
        for index, energy in enumerate(self.energies):
            if not 0 < energy < float("inf"):
                raise TurbopocketError(f"output {index} of the uncompressed model has energy {energy}, expected over 0")

    def relative_squared_error(self) -> float:
        """Mean over the outputs of ||y - y₀||² / ||y₀||²: every tensor counts alike, whatever its scale."""
        errors = [
            float((found - expected).square().sum()) / energy
            for found, expected, energy in zip(self.outputs(), self.reference, self.energies, strict=True)
        ]
        return sum(errors) / len(errors)


@dataclass(frozen=True)
class _Job:
    name: str
    weight: Tensor
    formats: tuple[LayerFormat, ...]
    fit: Fit
    hessian_KK: Tensor


@dataclass(frozen=True)
class _Fitted:
    """Hessian losses in the order of the formats, and the weight as the smallest one stores it."""

    losses: tuple[float, ...]
    smallest: Tensor
    smallest_loss: float


def _job(
    name: str, layer: nn.Module, stats: Mapping[str, LayerStats], formats: Sequence[LayerFormat], fit: Fit
) -> _Job:
    weight = weight_of(name, layer).detach()
    if name not in stats:
        raise TurbopocketError(f"{name}: no statistics, the layer did not run while calibrating")
    if not formats:
        raise TurbopocketError(f"{name}: no candidate format")
    return _Job(name, weight, tuple(formats), fit, stats[name][SecondMoment].hessian_KK)


def _fitted(job: _Job) -> _Fitted:
    shape, losses = tuple(job.weight.shape), []
    with of_layer(job.name):
        smallest = min(job.formats, key=lambda each: each.nbytes(shape))
        for each in job.formats:
            stored = each.decompress(each.compress(job.weight, job.fit, job.hessian_KK))
            losses.append(hessian_loss(stored - job.weight.to("cpu", torch.float32), job.hessian_KK))
            if each is smallest:
                kept = stored
    return _Fitted(tuple(losses), kept, losses[job.formats.index(smallest)])


def hessian_loss(error: Tensor, hessian_KK: Tensor) -> float:
    """tr[E H Eᵀ] of a weight error in the weight's own shape: mean squared change of the output."""
    error_OK = matrix_view(error)
    return max(0.0, float(((error_OK @ hessian_KK) * error_OK).sum(dtype=torch.float64)))


@contextmanager
def _replaced(weight: Tensor, stored: Tensor) -> Iterator[None]:
    original = weight.detach().clone()
    weight.copy_(stored)
    try:
        yield
    finally:
        weight.copy_(original)


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
    return LayerChoices(entry["layer"], tuple(entry["shape"]), candidates)
