# SPDX-License-Identifier: Apache-2.0
"""What a model will weigh, before anyone spends hours: size arithmetic on shapes, no weights, no tracing."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..ground.errors import OverBudget, TurbopocketError
from ..quant.account import account
from ..quant.peak import PeakMemory
from ..quant.plan import Candidate, Choice, LayerChoices, Plan, bound_by, bytes_at, smallest_total_bytes
from ..quant.plan import plan as least_loss
from ..quant.scheme import Scheme, parse_scheme
from ..quant.sensitivity import estimate_from_shapes, load_choices
from .build.candidates import candidate_schemes, resolved, with_schemes
from .build.fixed_bytes import Estimate, fixed_bytes, show_estimates
from .build.forecast import Forecast, forecast, largest_of, require_memory, works_of
from .build.forecast_work import ComponentWork
from .build.peak import limits_line, memory_lines, peak_memory
from .build.rewriting import shaped
from .checkpoint.load import load_shapes
from .devices import DeviceFit, memory_limits, require_devices
from .families.base import LoadedModel
from .families.components import component_name, group_name, layers_of, parameter_count, shapes_of
from .families.sizes import drawn_sizes
from .recipe import Recipe
from .request import require_measured
from .sampling.defaults import SamplingUnknown
from .sampling.spec import with_sampling
from .targets.base import Target
from .targets.layer import kind_of
from .targets.registry import open_target
from .units import format_bytes


@dataclass(frozen=True)
class Weighed:
    """Layers that belong together: how many, their weights, and bytes as fp16 and as planned."""

    layers: int
    weights: int
    fp16_bytes: int
    bytes: int


@dataclass(frozen=True)
class Planned:
    """What a recipe's model will weigh, all in bytes, and in which scheme each layer would be stored and run.

    Attributes:
        model: its name; target: what it is lowered to; loss_model: "shapes", or the file of the measured losses.
        plan: the schemes chosen, layer by layer, and what each component takes of the device's memory at its peak.
        bound_by: the limits without which it would lose less: "budget", and components by their peak memory.
        fixed_bytes: graphs, uncompressed tensors, tokenizers, configs and the manifest; `estimates` says which of them
            were not there to be counted, and how they were estimated.
        smallest_bytes: of the smallest artifact that the recipe allows.
        fp16_bytes: of the whole model in fp16.
        components, groups: what each component, and each group of layers of one kind and place, weighs.
        parts: bytes of codes, scales, codebooks and so on of all layers together.
        average_bits: stored bits for each weight of a compressed layer; kept: layers in floating point.
        notes: what of the model and its sampling was assumed, or will be asked for by a build.
        forecast: what a build will take of this machine; None where it is not known how pictures are drawn.
        devices: whether it can draw on those that were asked for.
    """

    model: str
    target: str
    loss_model: str
    plan: Plan
    bound_by: tuple[str, ...]
    estimates: tuple[Estimate, ...]
    smallest_bytes: int
    fp16_bytes: int
    components: Mapping[str, Weighed]
    groups: Mapping[str, Weighed]
    parts: Mapping[str, int]
    average_bits: float
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    forecast: Forecast | None
    devices: tuple[DeviceFit, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of all files of the artifact."""
        return self.plan.total_bytes

    @property
    def fixed_bytes(self) -> int:
        """Of all that is no layer's weight."""
        return self.plan.fixed_bytes

    @property
    def budget_bytes(self) -> int | None:
        """What the recipe allows; None: anything."""
        return self.plan.budget_bytes

    @property
    def layers(self) -> dict[str, str]:
        """Layer name to scheme, such as `int4-g32` or `int8-row+a8-dynamic`."""
        return {choice.layer: choice.scheme for choice in self.plan.choices}

    def summary(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {
            "model": self.model,
            "notes": list(self.notes),
            "target": self.target,
            "loss_model": self.loss_model,
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "fixed_bytes": self.fixed_bytes,
            "estimated": [asdict(each) for each in self.estimates],
            "smallest_bytes": self.smallest_bytes,
            "peak_memory_bytes": self.plan.peak_memory_bytes,
            "memory": {name: asdict(each) for name, each in self.plan.memory.items()},
            "bound_by": list(self.bound_by),
            "predicted_loss": self.plan.predicted_loss,
            "fp16_bytes": self.fp16_bytes,
            "components": {name: asdict(each) for name, each in self.components.items()},
            "groups": {name: asdict(each) for name, each in self.groups.items()},
            "formats": _by_format(self.plan),
            "parts": dict(self.parts),
            "average_bits": self.average_bits,
            "kept": list(self.kept),
            "layers": self.layers,
            "forecast": None if self.forecast is None else self.forecast.summary(),
            "devices": [each.summary() for each in self.devices],
        }


def plan(recipe: Recipe, measured: Path | str | None = None, workers: int = 1, devices: Sequence[str] = ()) -> Planned:
    """Says in seconds what a recipe's model will weigh, from its configs alone: no weights are read.

    With `measured` (a build's choices.json) losses are measured ones, else every weight counts alike. Of several
    targets it is the first one's. `devices` are names from `DEVICES`: what an app may have on all of them is a limit of
    peak memory where the recipe has none, and is not kept where nothing could.
    Raises OverBudget when nothing that the recipe allows fits, and TurbopocketError for a model that can not be read,
    for measurements of another one and for a device that is not known.
    """
    require_devices(devices)
    target = open_target(recipe.target)
    model = load_shapes(recipe.model.source, recipe.model.config)
    sizes = drawn_sizes(model, recipe.image.image_sizes)
    components = target.components(model, sizes, recipe.sampler.image_to_image)
    components = shaped(components, recipe, model)
    shapes = shapes_of(layers_of(components))
    asked = candidate_schemes(target, shapes, recipe.compress.formats, recipe.compress.pin)
    if measured is None:
        formats = {name: list(dict.fromkeys(each.weight for each in schemes)) for name, schemes in asked.items()}
        known = with_schemes(estimate_from_shapes(shapes, formats), resolved(target, shapes, asked))
    else:
        known = _measured(Path(measured), target, shapes, asked)
    choices = list(known.values())
    beside = fixed_bytes(target, model, components, sizes[0], asked)
    pins, budget = recipe.compress.pin, recipe.compress.budget_bytes
    if recipe.compress.average_bits is not None:
        budget = beside.total + bytes_at(choices, recipe.compress.average_bits)
    works = works_of(model, components, largest_of(sizes))
    memory = peak_memory(target, works, known, recipe.compress.peak_memory_bytes)
    decided, memory = _within(memory_limits(devices), choices, budget, beside.total, pins, memory)
    bound = bound_by(choices, decided, pins, memory)
    decided = replace(decided, budget_bytes=recipe.compress.budget_bytes)
    accounted = account(decided.choices)
    drawn, notes = _with_sampling(recipe, model)
    return Planned(
        model=model.name,
        target=recipe.target.name,
        loss_model="shapes" if measured is None else str(measured),
        plan=decided,
        bound_by=bound,
        estimates=tuple(beside.estimates),
        smallest_bytes=smallest_total_bytes(choices, beside.total, pins, memory),
        fp16_bytes=sum(2 * parameter_count(component) for component in components),
        components=_by(decided, component_name),
        groups=_by(decided, group_name),
        parts=accounted.part_bytes,
        average_bits=accounted.average_bits(),
        kept=tuple(accounted.kept),
        notes=(*model.notes, *notes, *_notes_on_scales(decided, measured is None)),
        forecast=None if drawn is None else _forecast(drawn, model, target, works, workers),
        devices=tuple(DeviceFit(name, decided.memory) for name in devices),
    )


def _within(
    limits: Sequence[int],
    layers: Sequence[LayerChoices],
    budget_bytes: int | None,
    fixed_bytes: int,
    pins: Mapping[str, str],
    memory: PeakMemory,
) -> tuple[Plan, PeakMemory]:
    """The best plan within the recipe's limit of memory; without one within the first of `limits` that any plan keeps,
    else within none."""
    tried = [replace(memory, allowed_bytes=limit) for limit in limits] if memory.allowed_bytes is None else []
    for within in tried:
        with suppress(OverBudget):
            return least_loss(layers, budget_bytes, fixed_bytes, pins, within), within
    return least_loss(layers, budget_bytes, fixed_bytes, pins, memory), memory


def _notes_on_scales(decided: Plan, from_shapes: bool) -> tuple[str, ...]:
    static = sum(scheme.is_static for scheme in decided.schemes.values())
    if not (static and from_shapes):
        return ()
    return (f"at most {static} layers have static scales of activations: calibration leaves some of them dynamic",)


def _forecast(
    recipe: Recipe, model: LoadedModel, target: Target, works: Mapping[str, ComponentWork], workers: int
) -> Forecast:
    """Raises TurbopocketError when it is over the recipe's `max_ram`."""
    foreseen = forecast(recipe, model, target, works, workers)
    if (allowed := recipe.machine.max_ram_bytes) is not None:
        require_memory(foreseen, allowed, "max_ram allows")
    return foreseen


def _with_sampling(recipe: Recipe, model: LoadedModel) -> tuple[Recipe | None, tuple[str, ...]]:
    """What a build would assume, or ask for: then there is no recipe. Bytes do not depend on it."""
    if model.family.only_planned is not None:
        return None, (f"nothing but this plan is made of such a folder yet: {model.family.only_planned}",)
    try:
        return with_sampling(recipe, model)
    except SamplingUnknown as error:
        return None, (f"build will ask for it: {error} ({error.hint})",)


def _measured(
    path: Path, target: Target, shapes: Mapping[str, tuple[int, ...]], asked: Mapping[str, Sequence[Scheme]]
) -> dict[str, LayerChoices]:
    """The saved choices, narrowed to what is asked for. Raises TurbopocketError when they are of another model."""
    require_measured(path)
    saved = load_choices(path)
    if odd := sorted(set(saved) ^ set(shapes)):
        raise TurbopocketError(f"{path} is of another model: {len(odd)} layers differ, {odd[0]} first")
    narrowed = {}
    for name, layer in saved.items():
        found = [_as_measured(target, layer, each) for each in asked[name]]
        kept = tuple(dict.fromkeys(each for each in found if each is not None))
        if not kept:
            known = ", ".join(candidate.scheme for candidate in layer.candidates)
            raise TurbopocketError(f"{path}: {name} was measured in {known} only")
        narrowed[name] = LayerChoices(layer.layer, layer.shape, kept)
    return narrowed


def _as_measured(target: Target, layer: LayerChoices, asked: Scheme) -> Candidate | None:
    """The saved candidate of that weight format, in the scheme in which the target runs it; None where there is none.

    Which layers have static scales is told by the build that calibrated, where it is not asked for in so many words; a
    layer that it had pinned was measured as its pin.
    """
    whole = target.resolved(layer.layer, asked, kind_of(layer.shape))
    saved = {candidate.scheme: candidate for candidate in layer.candidates}
    alike = [name for name in saved if parse_scheme(name).weight == asked.weight]
    if asked.is_weight_only and whole.is_static:
        told = [name for name in alike if not parse_scheme(name).is_weight_only]
        if told:
            return saved[told[0]]
    return replace(saved[alike[0]], scheme=str(whole)) if alike else None


def _by(decided: Plan, key: Callable[[str], str]) -> dict[str, Weighed]:
    together: dict[str, list[Choice]] = defaultdict(list)
    for choice in decided.choices:
        together[key(choice.layer)].append(choice)
    return {name: _weighed(choices) for name, choices in together.items()}


def _weighed(choices: Sequence[Choice]) -> Weighed:
    weights = sum(math.prod(choice.shape) for choice in choices)
    return Weighed(len(choices), weights, 2 * weights, sum(choice.nbytes for choice in choices))


def _by_format(decided: Plan) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"layers": 0, "weights": 0, "bytes": 0})
    for choice in decided.choices:
        sums[choice.scheme]["layers"] += 1
        sums[choice.scheme]["weights"] += math.prod(choice.shape)
        sums[choice.scheme]["bytes"] += choice.nbytes
    return dict(sums)


def show_plan(planned: Planned, console: Console) -> None:
    """Prints the plan for a person: bytes per component, per group of layers and per format."""
    for title, weighed in (("component", planned.components), ("group of layers", planned.groups)):
        table = Table(title=None, header_style="bold")
        table.add_column(title)
        for column in ("layers", "weights", "fp16", "planned"):
            table.add_column(column, justify="right")
        for name, each in weighed.items():
            sizes = format_bytes(each.fp16_bytes), format_bytes(each.bytes)
            table.add_row(name, str(each.layers), f"{each.weights:,}", *sizes)
        console.print(table)
    for name, entry in _by_format(planned.plan).items():
        console.print(f"{name:19} {entry['layers']:4} layers {format_bytes(entry['bytes']):>12}", highlight=False)
    parts = ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in planned.parts.items())
    console.print(f"{planned.average_bits:.3f} bits per weight: {parts}", highlight=False)
    if planned.kept:
        console.print(f"{len(planned.kept)} layers in floating point, {planned.kept[0]} first", highlight=False)
    console.print(f"{'everything else':19} {format_bytes(planned.fixed_bytes):>22}", highlight=False)
    for line in show_estimates(planned.estimates):
        console.print(line, highlight=False, soft_wrap=True)
    for note in planned.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    within = f" of {format_bytes(planned.budget_bytes)} allowed" if planned.budget_bytes else ""
    console.print(f"total {format_bytes(planned.total_bytes)}{within}", highlight=False)
    console.print(f"smallest possible {format_bytes(planned.smallest_bytes)}", highlight=False)
    for line in memory_lines(planned.plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(limits_line(planned.plan, planned.bound_by), highlight=False, soft_wrap=True)
    for line in planned.forecast.lines() if planned.forecast else ():
        console.print(line, highlight=False, soft_wrap=True)
    for fit in planned.devices:
        console.print(fit.line, highlight=False, soft_wrap=True)
