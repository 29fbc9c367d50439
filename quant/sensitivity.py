# SPDX-License-Identifier: Apache-2.0
"""What each layer loses in each format: measured on the model, or estimated from shapes alone.

Measuring is slow and its result is saved; deciding (plan.py) only reads it.
R rows of the model's output y, S vectors, N rows of a layer's input, C candidates.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError, of_layer
from ..ground.records import load_record, save_record
from .fit import Fit
from .formats import CompressedTensor, LayerFormat, matrix_view
from .layer_rounding import Rounding
from .layers import output_without_bias, weight_of, weight_shape
from .observe import LayerStats, carried_for, hessian_for
from .output_gradients import BlockTape, LayerCall
from .plan import Candidate, LayerChoices, with_scheme
from .store import CandidateStore, save_weights
from .workers import Spread, in_turn

SCHEMA_VERSION = 2
VECTORS = 8
KEPT_BYTES = 2**28
"""How much of a model is kept between its blocks at once, where one row does not take more."""


NO_ROUNDINGS: Mapping[str, Mapping[str, Rounding]] = MappingProxyType({})
"""Of layers of which only weights are decided."""


@dataclass(frozen=True)
class RowwiseOutput:
    """The output y of a part of a model, in `rows` rows that do not see each other.

    `run` gives y [n, …] of a slice of the rows, by PyTorch's own modules, so that gradients can be taken. `blocks` are
    modules of the part that run again as wholes when they are: what one of them holds in memory is the most that there
    is at once. `energy` is what losses are shares of, ||y||² when None. `timesteps` are those of the rows' calls, where
    each has one.
    """

    rows: int
    run: Callable[[slice], Tensor]
    blocks: Collection[nn.Module] = ()
    energy: float | None = None
    timesteps: Sequence[float] | None = None


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


def measure(
    layers: Mapping[str, nn.Module],
    candidates: Mapping[str, Sequence[LayerFormat]],
    stored: Mapping[str, Sequence[CompressedTensor]],
    output: RowwiseOutput,
    vectors: int = VECTORS,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    roundings: Mapping[str, Mapping[str, Rounding]] = NO_ROUNDINGS,
    kept: Path | None = None,
) -> dict[str, LayerChoices]:
    """Predicted loss of every layer in each candidate format: ||J dW||² / ||y||², to first order what y changes by.

    The same of each way to round its activations, alone: ||J' e||² / ||y||², with J' the derivative of y in the layer's
    output and e what rounding changes in that. Where both are done, losses add up, as errors that know nothing of each
    other do.

    dW is the very error of the weight as `stored` has it, J the derivative of y in the weight. With v of independent
    standard normal numbers <v, J dW>² has the mean ||J dW||² (Hutchinson 1990), and <v, J dW> is the inner product of
    what dW makes of the layer's input with the gradient of <v, y> in the layer's output: no layer is ever changed, and
    no gradient of a weight is made. Rows do not see each other, so each is a sample of its own: S vectors give S·R. All
    candidates of all layers are measured with the same vectors, which are a function of `seed` and the rows.

    A layer with one format and none of `roundings` is not measured and has loss 0: nothing is decided about it.
    `advance` is called for each row that is done. `kept` is a file that holds what is known after each run of the
    model; where it is there already, measuring goes on from it, to the same losses. TurbopocketError when y is zero or
    not finite.
    """
    sums = _Losses(layers, candidates, stored, roundings)
    if not sums.measured:
        return sums.choices(1.0)
    generator = torch.Generator().manual_seed(seed)
    first, at_once, energy = 0, 1, 0.0
    if kept is not None and kept.is_file():
        first, at_once, energy = load_record(kept, "sums of losses", 1, partial(sums.restore, generator))
        for _ in range(first):
            advance()
    while first < output.rows:
        rows = min(at_once, output.rows - first)
        tape = BlockTape({name: layers[name] for name in sums.measured}, output.blocks)
        with tape.recording():
            y = output.run(slice(first, first + rows))
        energy += float(y.detach().square().sum(dtype=torch.float64))
        if not 0 < energy < float("inf"):
            raise TurbopocketError(f"output of the uncompressed model has energy {energy}, expected over 0")
        at_once = max(1, KEPT_BYTES * rows // tape.kept_bytes)
        drawn = torch.stack([torch.randn(vectors, *y.shape[1:], generator=generator) for _ in range(rows)], dim=1)
        with torch.no_grad():
            for call in tape.backward(y, drawn.unbind()):
                sums.add(call, rows, output.timesteps and output.timesteps[first : first + rows])
        sums.end_rows()
        first += rows
        if kept is not None:
            sums.save(kept, generator, {"rows": first, "at_once": at_once, "energy": energy})
        for _ in range(rows):
            advance()
    return sums.choices(energy if output.energy is None else output.energy)


class _Losses:
    """||J dW||² of all candidates, and ||J' e||² of all roundings behind them, summed over rows."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        candidates: Mapping[str, Sequence[LayerFormat]],
        stored: Mapping[str, Sequence[CompressedTensor]],
        roundings: Mapping[str, Mapping[str, Rounding]],
    ) -> None:
        self.layers, self.candidates, self.stored, self.roundings = layers, candidates, stored, roundings
        self.measured = [name for name, formats in candidates.items() if len(formats) > 1 or roundings.get(name)]
        self.losses = {name: [0.0] * (len(own) + len(roundings.get(name, ()))) for name, own in candidates.items()}
        self.products: dict[tuple[str, int], Tensor] = {}

    def add(self, call: LayerCall, rows: int, timesteps: Sequence[float] | None) -> None:
        """Inner products of one call; those of all calls of a layer are summed before they are squared."""
        layer = self.layers[call.layer]
        weight = weight_of(call.layer, layer).detach().to(torch.float32)
        # A layer may see several vectors a row, one row after the other, or one for all rows, which is one sample then.
        samples = rows if len(call.x) % rows == 0 else 1
        gradients = [each.reshape(samples, -1) for each in call.gradients]
        products = []
        for changed in self._changed(call.layer, layer, weight, call.x, timesteps):
            flat = changed.reshape(samples, -1)
            products.append(torch.stack([torch.linalg.vecdot(each, flat) for each in gradients]))
        found_CSN = torch.stack(products).to(torch.float64)
        key = call.layer, samples
        self.products[key] = self.products[key] + found_CSN if key in self.products else found_CSN

    def _changed(
        self, name: str, layer: nn.Module, weight: Tensor, x: Tensor, timesteps: Sequence[float] | None
    ) -> Iterator[Tensor]:
        """What each candidate, then each rounding, changes in the layer's output."""
        if len(self.candidates[name]) == 1:
            yield torch.zeros(1).expand_as(output_without_bias(layer, weight, x))
        else:
            for compressed in self.stored[name]:
                yield output_without_bias(layer, compressed.format.decompress(compressed) - weight, x)
        for rounding in self.roundings.get(name, {}).values():
            yield rounding.changed(layer, weight, x, timesteps)

    def end_rows(self) -> None:
        """All calls that some rows make have been added."""
        for (name, _), products_CSN in self.products.items():
            squares_C = products_CSN.square().mean(1).sum(1)
            self.losses[name] = [loss + float(more) for loss, more in zip(self.losses[name], squares_C, strict=True)]
        self.products = {}

    def save(self, path: Path, generator: torch.Generator, place: Mapping[str, float]) -> None:
        """Writes the sums, the place that they were summed up to, and where the generator is."""
        state = generator.get_state().numpy().tobytes().hex()
        save_record(path, {"schema_version": 1, **place, "generator": state, "losses": self.losses})

    def restore(
        self, generator: torch.Generator, values: Mapping[str, Any], schema_version: int
    ) -> tuple[int, int, float]:
        """Takes up saved sums; returns their place: rows, rows at once, energy."""
        if {name: len(own) for name, own in values["losses"].items()} != {n: len(o) for n, o in self.losses.items()}:
            raise TurbopocketError("its losses are of other layers or candidates")
        self.losses = values["losses"]
        generator.set_state(torch.frombuffer(bytearray.fromhex(values["generator"]), dtype=torch.uint8))
        return int(values["rows"]), int(values["at_once"]), float(values["energy"])

    def choices(self, energy: float) -> dict[str, LayerChoices]:
        """The losses as shares of the output's energy."""
        choices = {}
        for name, formats in self.candidates.items():
            shape = weight_shape(name, self.layers[name])
            losses = [loss / energy for loss in self.losses[name]]
            of_weights = zip(formats, losses, strict=False)
            candidates = tuple(Candidate(str(each), each.nbytes(shape), loss) for each, loss in of_weights)
            rounded = dict(zip(self.roundings.get(name, ()), losses[len(formats) :], strict=True))
            choices[name] = LayerChoices(name, shape, candidates, rounded)
        return choices


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
