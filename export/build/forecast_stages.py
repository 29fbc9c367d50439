# SPDX-License-Identifier: Apache-2.0
"""Memory, disk and seconds of each stage of a build, from what one call of each component takes.

K columns of a layer's weight. Memory is anonymous: mapped files count as disk.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...quant.fit import Fit, measuring_fit
from ...quant.formats import LayerFormat
from ...quant.observe.moments import STRIP_COLUMNS, WAITING_FLOATS
from ...quant.observe.vectors import CHUNK_FLOATS
from ...quant.options import CandidateOptions, FineTuneOptions, ReconstructOptions
from ...runtimes.kept import MOST_BYTES
from .forecast_fits import fit_bytes, fit_cost
from .forecast_rates import Rates
from .forecast_work import BlockWork, ComponentWork, LayerWork, Work, total

OBSERVED_OPERATORS = 60
"""Of each call of a layer that is observed."""
CONV_COPIES = 1.5
"""Of the most that a forward pass holds: convolutions have copies of what goes in and comes out, in blocks."""
WORKER_BYTES = 350e6
"""Of a process that fits layers, before it has one."""
LOAD_OPERATORS = 200
"""What it takes to make a layer, in operators."""
TRACE_OPERATORS = 960
"""What it takes to trace one operator for ONNX, in operators."""
RUNTIME_BYTES = 60e6
"""Of a runtime before it holds weights."""


@dataclass(frozen=True)
class Stage:
    """Seconds of each step, bytes of memory beside what a build holds anyhow, and bytes of files: while it runs, and
    what it leaves."""

    seconds: tuple[float, ...]
    memory: float = 0.0
    files: float = 0.0
    left: float = 0.0


@dataclass(frozen=True)
class Asked:
    """A build as far as its cost depends on it: `calls` of each component for one picture, `pixels` of that, how many
    of what, the weight formats that each layer may get, the layers that are judged by content, and the machine."""

    components: Mapping[str, ComponentWork]
    calls: Mapping[str, float]
    pixels: int
    latent_positions: int
    steps: int
    sizes: int
    pictures: int
    decoded_pixels: int
    parity_pictures: int
    probe_prompts: int
    probe_steps: int
    runtimes: int
    formats: Mapping[str, Sequence[LayerFormat]]
    content: Collection[str]
    budget_bytes: int | None
    fit: Fit
    sequential: bool
    learning: ReconstructOptions | None
    candidates: CandidateOptions
    tuning: FineTuneOptions
    rates: Rates
    workers: int

    @cached_property
    def layers(self) -> dict[str, LayerWork]:
        """By name."""
        return {layer.name: layer for each in self.components.values() for layer in each.layers}

    @cached_property
    def blocks(self) -> list[tuple[ComponentWork, BlockWork]]:
        """Of all components."""
        return [(each, block) for each in self.components.values() for block in each.blocks.values()]

    @property
    def moves_vectors(self) -> bool:
        """Whether norms or biases are trained, which are part of a graph."""
        return bool(self.candidates.count or self.tuning.iterations)

    @cached_property
    def picture(self) -> Work:
        """Of one picture."""
        return total([each.work * self.calls[name] for name, each in self.components.items()])

    @property
    def drawing_bytes(self) -> float:
        """Held while a picture is drawn, at most."""
        return CONV_COPIES * max(each.peak_bytes for each in self.components.values())

    @property
    def decoded_pictures(self) -> int:
        """Of those that are drawn to calibrate."""
        return min(self.pictures, math.ceil(self.decoded_pixels / self.pixels))

    def runs(self, component: ComponentWork) -> float:
        """Calls of a component while pictures are drawn to calibrate."""
        drawn = self.decoded_pictures if component.role in ("decoder", "encoder") else self.pictures
        return self.calls[component.name] * drawn

    def stored_as(self, layer: LayerWork) -> LayerFormat:
        """About the format that a plan chooses: the best, or the best of no more bits than a budget has on average."""
        formats = sorted(self.formats[layer.name], key=lambda each: each.nbytes(layer.shape))
        if self.budget_bytes is None:
            return formats[-1]
        share = self.budget_bytes / sum(each.weights for each in self.layers.values())
        return next(
            (each for each in reversed(formats) if each.nbytes(layer.shape) <= share * layer.weights), formats[0]
        )

    @cached_property
    def stored_bytes(self) -> int:
        """Of all layers, as far as formats and budget say."""
        bounds = [[each.nbytes(layer.shape) for each in self.formats[name]] for name, layer in self.layers.items()]
        largest, smallest = sum(map(max, bounds)), sum(map(min, bounds))
        return largest if self.budget_bytes is None else max(smallest, min(largest, self.budget_bytes))

    @property
    def kept_bytes(self) -> float:
        """Of components that a runtime holds open when it has drawn."""
        return min(self.stored_bytes, MOST_BYTES)

    @property
    def compared_bytes(self) -> float:
        """Held while a runtime draws: weights in an order of their own, and what it computes with."""
        weights = {name: each.weights for name, each in self.components.items()}
        alone = self.stored_bytes * max(weights.values()) / sum(weights.values())
        return max(alone, self.kept_bytes) + self.drawing_bytes + RUNTIME_BYTES


def loading(asked: Asked) -> Work:
    """Files checked, modules made, what is no layer's weight widened."""
    others = sum(each.others_bytes for each in asked.components.values())
    weights = sum(each.weights for each in asked.components.values())
    return Work(bytes=4.0 * others + 2.0 * weights, operators=LOAD_OPERATORS * len(asked.layers))


def trace(asked: Asked) -> Stage:
    """Each component as its target's graph."""
    operators = [each.work.operators for each in asked.components.values()]
    return Stage(tuple(TRACE_OPERATORS * each * asked.rates.operator_seconds for each in operators))


def reference(asked: Asked) -> Stage:
    """A picture of each size by diffusers' pipeline and by ours."""
    return Stage((2 * asked.sizes * asked.rates.seconds(asked.picture),), asked.drawing_bytes)


def calibrate(asked: Asked) -> Stage:
    """Pictures, observed, and where a fit reads whole Hessians each block again."""
    whole = asked.fit.whole_hessian or measuring_fit(asked.fit).whole_hessian
    pictures = [0.0] * asked.pictures
    for component in asked.components.values():
        runs = asked.runs(component)
        observed = component.work + total([_observing(layer) for layer in component.layers])
        hashed = 4 * sum(layer.inputs for layer in component.layers)
        hashed += 2 * whole * sum(block.input_bytes for block in component.blocks.values())
        seconds = asked.rates.seconds(observed) + hashed / asked.rates.hashed_bytes
        shown = asked.decoded_pictures if component.role in ("decoder", "encoder") else asked.pictures
        for index in range(shown):
            pictures[index] += seconds * runs / shown
    largest = max(layer.inputs for layer in asked.layers.values())
    drawing = asked.drawing_bytes + 12 * largest
    if not whole:
        return Stage((*pictures, *(0.0 for _ in asked.blocks)), drawing)
    seen: set[tuple[str, int, int]] = set()
    blocks, memory, moments = [], drawing, 0.0
    for component, block in asked.blocks:
        groups: dict[tuple[str, int, int], LayerWork] = {}
        for layer in block.layers:
            groups.setdefault((component.name, layer.fed, layer.columns), layer)
        groups = {key: layer for key, layer in groups.items() if key not in seen}
        seen |= groups.keys()
        runs = asked.runs(component) if groups else 0.0
        work = block.work * runs + total([_summing(layer, runs) for layer in groups.values()])
        read = block.input_bytes * runs / asked.rates.bytes + runs * len(block.layers) * 1e-4
        blocks.append(asked.rates.seconds(work) + read)
        memory = max(memory, _moment_bytes(block, list(groups.values())))
        moments += sum(4 * _halved(layer.columns) for layer in groups.values())
    kept = sum(block.input_bytes * asked.runs(component) for component, block in asked.blocks)
    return Stage((*pictures, *blocks), memory, kept + moments, moments)


def _observing(layer: LayerWork) -> Work:
    taps = 12 * layer.inputs if len(layer.shape) == 4 else 0
    return Work(bytes=4.0 * (10 * layer.inputs + 8 * layer.outputs + taps), operators=OBSERVED_OPERATORS * layer.calls)


def _summing(layer: LayerWork, runs: float) -> Work:
    """Products of a layer's input vectors, and what they are added to in float64."""
    vectors, columns = layer.vectors * runs, layer.columns
    products = math.ceil(vectors / _at_once(columns))
    moved = 12.0 * vectors * columns + 20.0 * products * _halved(columns)
    return Work(flops=2 * vectors * _halved(columns), bytes=moved, operators=20 * runs + 8 * products)


def _at_once(columns: int) -> int:
    return min(columns, max(1, WAITING_FLOATS // columns))


def _halved(columns: int) -> float:
    """Numbers of a symmetric matrix that is kept in strips."""
    return columns * (columns + min(columns, STRIP_COLUMNS)) / 2


def _moment_bytes(block: BlockWork, groups: Sequence[LayerWork]) -> float:
    """While a block runs by itself: sums in float64, vectors that wait, one product; and what the block holds."""
    if not groups:
        return 0.0
    sums = sum(8 * _halved(layer.columns) for layer in groups)
    waiting = [4 * min(layer.vectors, _at_once(layer.columns)) * layer.columns for layer in groups]
    product = max(4 * layer.columns * min(layer.columns, STRIP_COLUMNS) for layer in groups)
    return sums + sum(waiting) + max(waiting) + product + 8 * CHUNK_FLOATS + 2 * block.made_bytes


def try_formats(asked: Asked) -> Stage:
    """Layers that have a choice, in each of their formats, by a quick fit."""
    fit = measuring_fit(asked.fit)
    several = {name: formats for name, formats in asked.formats.items() if len(formats) > 1}
    seconds = [
        _fit_seconds(asked, layer, several[name], fit) if name in several else 0.0
        for name, layer in asked.layers.items()
    ]
    files = sum(each.nbytes(asked.layers[name].shape) for name, formats in several.items() for each in formats)
    left = float(files if fit.name == asked.fit.name else 0)
    return Stage(tuple(seconds), _fitting_bytes(asked, several, fit), files, left)


def compress_in_blocks(asked: Asked) -> Stage:
    """Block by block, each run as it is and as it is stored, on what pictures drawn once a component gave."""
    drawn = sum(asked.rates.seconds(each.work) * asked.runs(each) for each in asked.components.values())
    seconds, memory, files = [], 0.0, 0
    for component, block in asked.blocks:
        runs, fed = asked.runs(component), {(each.fed, each.columns): each for each in block.layers}
        again = block.work * (2 * runs)
        if asked.fit.whole_hessian:
            again = again + total([_summing(layer, runs) for layer in fed.values()])
        chosen = {layer.name: [asked.stored_as(layer)] for layer in block.layers}
        others = drawn / len(asked.layers) + asked.rates.seconds(again) / max(1, len(block.layers))
        seconds += [others + _fit_seconds(asked, each, chosen[each.name], asked.fit) for each in block.layers]
        sums = _moment_bytes(block, list(fed.values())) if asked.fit.whole_hessian else 0.0
        memory = max(memory, sums, sums / 2 + _fitting_bytes(asked, chosen, asked.fit))
        files += sum(each.nbytes(asked.layers[name].shape) for name, (each,) in chosen.items())
    given = max(
        asked.runs(each) * sum(block.output_bytes + block.input_bytes for block in each.blocks.values())
        for each in asked.components.values()
    )
    return Stage(tuple(seconds), max(memory, asked.drawing_bytes), given + files, files)


def fine_tune(asked: Asked) -> Stage:
    """Pictures whose calls are trained on, and so many iterations of each component, all of it in memory: weights and
    their gradients, what operators made of a batch, and the calls."""
    iterations, batch, pictures = asked.tuning.iterations, asked.tuning.batch, asked.tuning.pictures
    steps, memory = [asked.rates.seconds(asked.picture)] * pictures, 0.0
    for each in asked.components.values():
        steps += [asked.rates.seconds(each.work * (3 * batch))] * iterations
        made = batch * sum(block.made_bytes for block in each.blocks.values())
        memory = max(memory, 8.0 * each.weights + made)
    calls = pictures * sum(each.returned_bytes * asked.calls[name] for name, each in asked.components.items())
    return Stage(tuple(steps), memory + calls, asked.stored_bytes, asked.stored_bytes)


def compress(asked: Asked) -> Stage:
    """Layers in the format that the plan chose, as far as trying has not made them."""
    if asked.sequential:
        return compress_in_blocks(asked)
    tried = measuring_fit(asked.fit).name == asked.fit.name
    chosen = {
        name: [asked.stored_as(layer)]
        for name, layer in asked.layers.items()
        if not (tried and len(asked.formats[name]) > 1)
    }
    seconds = [
        _fit_seconds(asked, layer, chosen[name], asked.fit) if name in chosen else 0.0
        for name, layer in asked.layers.items()
    ]
    files = sum(each.nbytes(asked.layers[name].shape) for name, (each,) in chosen.items())
    return Stage(tuple(seconds), _fitting_bytes(asked, chosen, asked.fit), files, files)


def _fit_seconds(asked: Asked, layer: LayerWork, formats: Sequence[LayerFormat], fit: Fit) -> float:
    each = sum(fit_cost(one, fit, asked.rates).seconds(layer, asked.rates) for one in formats)
    # The weight is widened or copied, the results are written.
    moved = Work(bytes=30.0 * layer.weights + 4.0 * fit.whole_hessian * layer.columns**2, operators=500)
    return (each + asked.rates.seconds(moved)) / asked.workers


def _fitting_bytes(asked: Asked, formats: Mapping[str, Sequence[LayerFormat]], fit: Fit) -> float:
    """Largest layers side by side, one in each process, and those that wait for one."""
    needs = sorted((fit_bytes(asked.layers[name], fit, each) for name, each in formats.items()), reverse=True)
    if asked.workers == 1:
        return max(needs, default=0.0)
    jobs = sorted(
        (
            4.0 * asked.layers[name].weights + 4.0 * fit.whole_hessian * asked.layers[name].columns ** 2
            for name in formats
        ),
        reverse=True,
    )
    return sum(needs[: asked.workers]) + 2 * sum(jobs[: asked.workers]) + asked.workers * WORKER_BYTES


def lower(asked: Asked) -> Stage:
    """Each component's files."""
    seconds = [
        asked.rates.seconds(Work(bytes=20.0 * each.weights, operators=60.0 * len(each.layers)))
        for each in asked.components.values()
    ]
    largest = max(layer.weights for layer in asked.layers.values())
    return Stage(tuple(seconds), 12.0 * largest, 2 * asked.stored_bytes, asked.stored_bytes)
