# SPDX-License-Identifier: Apache-2.0
"""What each layer loses in each format and with each rounding, from passes back through the model: row by row.

Rows do not see each other, so workers share them. Sums are made here, in the order of the rows: they are the same to
the last digit whoever computed a row, and however often measuring was stopped.
R rows of the model's output y, S vectors, N rows of a layer's input, C candidates.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError
from ..ground.records import load_record, save_record
from .formats import CompressedTensor, LayerFormat
from .layer_rounding import Rounding
from .layers import output_without_bias, weight_of, weight_shape
from .output_gradients import BlockTape, LayerCall
from .plan import Candidate, LayerChoices
from .shared import SharedWork, share
from .workers import Spread, in_turn, worker_count

VECTORS = 8
KEPT_BYTES = 2**25
"""How much of a model is kept between its blocks at once, where one row does not take more. Small rows in company save
what operators take before they compute anything; large ones gain nothing, and are what workers share."""
WORTH_SECONDS = 30.0
"""What measuring would take here at least, to be shared: a worker takes some seconds to import what models are of."""
SUMS_FILE = "measure-{}.json"
"""What is known of losses in one of the outputs while they are measured."""
SHARED_FILE = "measured.bin"
"""The tensors that workers read while they measure."""


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


@dataclass(frozen=True)
class RowLosses:
    """||y||² of some rows, and of each layer <v, J dW>² by vector and candidate [S][C], then <v, J' e>² by rounding."""

    energy: float
    squares: Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Question:
    """What some layers lose in one output: each candidate as `stored` has it, and each of the `roundings`.

    `vectors` are drawn for each row, from `seed`.
    """

    layers: Mapping[str, nn.Module]
    candidates: Mapping[str, Sequence[LayerFormat]]
    stored: Mapping[str, Sequence[CompressedTensor]]
    output: RowwiseOutput
    roundings: Mapping[str, Mapping[str, Rounding]] = field(default_factory=dict)
    vectors: int = VECTORS
    seed: int = 0

    @property
    def measured(self) -> list[str]:
        """Layers of which something is decided."""
        return [name for name, own in self.candidates.items() if len(own) > 1 or self.roundings.get(name)]

    def of_rows(self, rows: slice, vectors: slice) -> RowLosses:
        """What is lost in these rows, by some of the vectors: the same numbers whatever others come along."""
        tape, y = self._recorded(rows)
        energy = float(y.detach().square().sum(dtype=torch.float64))
        drawn, timesteps, products = self._drawn(rows, y.shape[1:]), self.output.timesteps, _Products(self)
        with torch.no_grad():
            for call in tape.backward(y, drawn[vectors].unbind()):
                products.add(call, rows.stop - rows.start, timesteps and timesteps[rows])
        return RowLosses(energy, products.squares())

    def rows_at_once(self) -> int:
        """How many rows are measured together."""
        tape, _ = self._recorded(slice(0, 1))
        return max(1, min(self.output.rows, KEPT_BYTES // max(1, tape.kept_bytes)))

    def _drawn(self, rows: slice, shape: Sequence[int]) -> Tensor:
        """Vectors [S, n, …] of these rows: those that they get when all rows are drawn for in turn."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(rows.start):
            torch.randn(self.vectors, *shape, generator=generator)
        of_rows = [torch.randn(self.vectors, *shape, generator=generator) for _ in range(rows.stop - rows.start)]
        return torch.stack(of_rows, dim=1)

    def _recorded(self, rows: slice) -> tuple[BlockTape, Tensor]:
        tape = BlockTape({name: self.layers[name] for name in self.measured}, self.output.blocks)
        with tape.recording():
            return tape, self.output.run(rows)


def measure(
    questions: Sequence[Question],
    advance: Callable[[], None] = lambda: None,
    spread: Spread = in_turn,
    folder: Path | None = None,
) -> list[dict[str, LayerChoices]]:
    """Predicted loss of every layer in each candidate format: ||J dW||² / ||y||², to first order what y changes by.

    The same of each way to round its activations, alone: ||J' e||² / ||y||², with J' the derivative of y in the layer's
    output and e what rounding changes in that. Where both are done, losses add up, as errors that know nothing of each
    other do.

    dW is the very error of the weight as `stored` has it, J the derivative of y in the weight. With v of independent
    standard normal numbers <v, J dW>² has the mean ||J dW||² (Hutchinson 1990), and <v, J dW> is the inner product of
    what dW makes of the layer's input with the gradient of <v, y> in the layer's output: no layer is ever changed, and
    no gradient of a weight is made. Rows do not see each other, so each is a sample of its own: S vectors give S·R. All
    candidates of all layers are measured with the same vectors, which are a function of `seed` and the rows.

    A layer with one format and none of its roundings is not measured and has loss 0: nothing is decided about it.
    `advance` is called for each row that is done. Workers of `spread` that reach the files of `folder` and of the model
    share the rows, where that is worth it. `folder` keeps what is known after each run of the model; where something is
    there already, measuring goes on from it, to the same losses. TurbopocketError when y is zero or not finite.
    """
    sums = [
        _Sums(each, None if folder is None else folder / SUMS_FILE.format(index))
        for index, each in enumerate(questions)
    ]
    for each in sums:
        for _ in range(each.rows):
            advance()
    jobs, seconds = _jobs(sums)
    here = partial(_losses_of, questions)
    found: Iterator[RowLosses | None]
    if spread is in_turn or folder is None or seconds < WORTH_SECONDS:
        found = map(here, jobs)
    else:
        jobs = _shared_out(jobs, worker_count(spread))
        found = spread(SharedWork(share(questions, folder / SHARED_FILE), _losses_of), jobs)
    for job, losses in zip(jobs, found, strict=True):
        for _ in range(sums[job.question].add(job, here(job) if losses is None else losses)):
            advance()
    return [each.choices() for each in sums]


@dataclass(frozen=True)
class _Job:
    """Some rows of one of the questions, and some of the vectors."""

    question: int
    rows: slice
    vectors: slice


def _losses_of(questions: Sequence[Question], job: _Job) -> RowLosses:
    return questions[job.question].of_rows(job.rows, job.vectors)


def _jobs(sums: Sequence["_Sums"]) -> tuple[list[_Job], float]:
    """What is to do, and about how many seconds of this process that is."""
    jobs, seconds = [], 0.0
    for index, each in enumerate(sums):
        if each.rows == each.output_rows:
            continue
        begun, vectors = time.monotonic(), each.question.vectors
        at_once = each.question.rows_at_once()
        # Once forward, once again with gradients, and about as much as that for each vector.
        seconds += (2 + vectors) * (each.output_rows - each.rows) * (time.monotonic() - begun)
        for start in range(each.rows, each.output_rows, at_once):
            rows = slice(start, min(start + at_once, each.output_rows))
            jobs.append(_Job(index, rows, slice(0, vectors)))
    return jobs, seconds


def _shared_out(jobs: Sequence[_Job], workers: int) -> list[_Job]:
    """The same, with the last jobs of a question, of which there are fewer than workers, in parts by vectors: so three
    rows are half of them for each of two workers, but for what every vector needs."""
    shared: list[_Job] = []
    for _, group in groupby(jobs, lambda job: job.question):
        own = list(group)
        last = len(own) % workers
        shared += own[: len(own) - last]
        for job in own[len(own) - last :]:
            parts = min(job.vectors.stop, workers // last)
            bounds = [job.vectors.stop * part // parts for part in range(parts + 1)]
            shared += [replace(job, vectors=slice(*pair)) for pair in pairwise(bounds)]
    return shared


class _Sums:
    """Losses of one question, summed over the first `rows`."""

    def __init__(self, question: Question, kept: Path | None) -> None:
        self.question, self._kept = question, kept
        self.output_rows = question.output.rows if question.measured else 0
        self.rows, self.energy = 0, 0.0
        self._parts: list[RowLosses] = []
        self.losses = {
            name: [0.0] * (len(own) + len(question.roundings.get(name, ())))
            for name, own in question.candidates.items()
        }
        if kept is not None and kept.is_file():
            load_record(kept, "sums of losses", 1, self._restore)

    def add(self, job: _Job, found: RowLosses) -> int:
        """What the next vectors find in the next rows; returns how many rows are then done.

        TurbopocketError when the output is zero, or not finite.
        """
        self._parts.append(found)
        if job.vectors.stop < self.question.vectors:
            return 0
        self.rows, self.energy = job.rows.stop, self.energy + found.energy
        if not 0 < self.energy < float("inf"):
            raise TurbopocketError(f"output of the uncompressed model has energy {self.energy}, expected over 0")
        for name in found.squares:
            squares_SC = [squares for part in self._parts for squares in part.squares[name]]
            means = [math.fsum(squares) / len(squares) for squares in zip(*squares_SC, strict=True)]
            self.losses[name] = _added(self.losses[name], means)
        self._parts = []
        if self._kept is not None:
            values = {"rows": self.rows, "energy": self.energy, "losses": self.losses}
            save_record(self._kept, {"schema_version": 1, **values})
        return job.rows.stop - job.rows.start

    def _restore(self, values: Mapping[str, Any], schema_version: int) -> None:
        if {name: len(own) for name, own in values["losses"].items()} != {n: len(o) for n, o in self.losses.items()}:
            raise TurbopocketError("its losses are of other layers or candidates")
        self.losses, self.rows, self.energy = values["losses"], int(values["rows"]), float(values["energy"])

    def choices(self) -> dict[str, LayerChoices]:
        """The losses as shares of the output's energy."""
        asked, choices = self.question, {}
        energy = (self.energy or 1.0) if asked.output.energy is None else asked.output.energy
        for name, formats in asked.candidates.items():
            shape = weight_shape(name, asked.layers[name])
            losses = [loss / energy for loss in self.losses[name]]
            of_weights = zip(formats, losses, strict=False)
            candidates = tuple(Candidate(str(each), each.nbytes(shape), loss) for each, loss in of_weights)
            rounded = dict(zip(asked.roundings.get(name, ()), losses[len(formats) :], strict=True))
            choices[name] = LayerChoices(name, shape, candidates, rounded)
        return choices


class _Products:
    """Inner products of all candidates, and of all roundings behind them, in some rows."""

    def __init__(self, asked: Question) -> None:
        self._asked = asked
        self._products: dict[tuple[str, int], Tensor] = {}

    def add(self, call: LayerCall, rows: int, timesteps: Sequence[float] | None) -> None:
        """Those of one call; those of all calls of a layer are summed before they are squared."""
        layer = self._asked.layers[call.layer]
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
        self._products[key] = self._products[key] + found_CSN if key in self._products else found_CSN

    def _changed(
        self, name: str, layer: nn.Module, weight: Tensor, x: Tensor, timesteps: Sequence[float] | None
    ) -> Iterator[Tensor]:
        """What each candidate, then each rounding, changes in the layer's output."""
        if len(self._asked.candidates[name]) == 1:
            yield torch.zeros(1).expand_as(output_without_bias(layer, weight, x))
        else:
            for compressed in self._asked.stored[name]:
                yield output_without_bias(layer, compressed.format.decompress(compressed) - weight, x)
        for rounding in self._asked.roundings.get(name, {}).values():
            yield rounding.changed(layer, weight, x, timesteps)

    def squares(self) -> dict[str, list[list[float]]]:
        """Of all calls that the rows make, summed over rows [S][C]."""
        squares: dict[str, list[list[float]]] = {}
        for (name, _), products_CSN in self._products.items():
            found_SC = products_CSN.square().transpose(0, 1).tolist()
            found = [[math.fsum(rows) for rows in candidates] for candidates in found_SC]
            known = squares.get(name)
            squares[name] = found if known is None else [_added(*pair) for pair in zip(known, found, strict=True)]
        return squares


def _added(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [each + more for each, more in zip(one, other, strict=True)]
