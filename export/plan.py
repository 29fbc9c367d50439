# SPDX-License-Identifier: Apache-2.0
"""What a model will weigh, before anyone spends hours: size arithmetic on shapes, no weights, no tracing."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..ground.errors import TurbopocketError
from ..quant.account import account
from ..quant.formats import LayerFormat
from ..quant.plan import LayerChoices, Plan, plan, smallest_total_bytes
from ..quant.sensitivity import estimate_from_shapes, load_choices
from .build.candidates import candidate_formats
from .build.fixed_bytes import fixed_bytes, show_estimates
from .checkpoint.load import load_shapes
from .families.base import LoadedModel
from .families.components import component_name, group_name, layers_of, parameter_count, shapes_of
from .families.sizes import drawn_sizes
from .recipe import Recipe
from .sampling.defaults import SamplingUnknown
from .sampling.spec import with_sampling
from .targets.registry import open_target
from .units import format_bytes


def plan_source(recipe: Recipe, measured: Path | None) -> dict[str, Any]:
    """Returns the plan of a recipe's model and what each part of it weighs, from configs alone.

    With `measured` (a build's choices.json) losses are measured ones, else every weight counts alike.
    """
    target = open_target(recipe.target)
    model = load_shapes(recipe.model.source, recipe.model.config)
    sizes = drawn_sizes(model, recipe.image.image_sizes)
    components = target.components(model, sizes, recipe.sampler.image_to_image)
    shapes = shapes_of(layers_of(components))
    formats = candidate_formats(target, shapes, recipe.compress.formats, recipe.compress.pin)
    choices = estimate_from_shapes(shapes, formats) if measured is None else _measured(measured, shapes, formats)
    beside = fixed_bytes(target, model, components, sizes[0])
    fixed = beside.total
    pins = recipe.compress.pin
    decided = plan(list(choices.values()), recipe.compress.budget_bytes, fixed, pins)
    accounted = account(decided.choices)
    return {
        "model": model.name,
        "notes": [*model.notes, *_notes_on_sampling(recipe, model)],
        "target": recipe.target.name,
        "loss_model": "shapes" if measured is None else str(measured),
        "budget_bytes": recipe.compress.budget_bytes,
        "total_bytes": decided.total_bytes,
        "fixed_bytes": decided.fixed_bytes,
        "estimated": [asdict(each) for each in beside.estimates],
        "smallest_bytes": smallest_total_bytes(list(choices.values()), fixed, pins),
        "predicted_loss": decided.predicted_loss,
        "fp16_bytes": sum(2 * parameter_count(component) for component in components),
        "components": _by(decided, component_name),
        "groups": _by(decided, group_name),
        "formats": _by_format(decided),
        "parts": accounted.part_bytes,
        "average_bits": accounted.average_bits(),
        "kept": accounted.kept,
        "layers": {choice.layer: choice.format for choice in decided.choices},
    }


def _notes_on_sampling(recipe: Recipe, model: LoadedModel) -> tuple[str, ...]:
    """What a build would assume, or ask for: bytes do not depend on it."""
    try:
        return with_sampling(recipe, model)[1]
    except SamplingUnknown as error:
        return (f"build will ask for it: {error} ({error.hint})",)


def _measured(
    path: Path, shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, Sequence[LayerFormat]]
) -> dict[str, LayerChoices]:
    """The saved choices, narrowed to the wanted formats. Raises TurbopocketError when they are of another model."""
    if not path.is_file():
        raise TurbopocketError(f"{path} is not a file; --measured takes the choices.json of a build")
    saved = load_choices(path)
    if odd := sorted(set(saved) ^ set(shapes)):
        raise TurbopocketError(f"{path} is of another model: {len(odd)} layers differ, {odd[0]} first")
    narrowed = {}
    for name, layer in saved.items():
        names = {str(each) for each in formats[name]}
        kept = tuple(candidate for candidate in layer.candidates if candidate.format in names)
        if not kept:
            known = ", ".join(candidate.format for candidate in layer.candidates)
            raise TurbopocketError(f"{path}: {name} was measured in {known} only")
        narrowed[name] = LayerChoices(layer.layer, layer.shape, kept)
    return narrowed


def _by(decided: Plan, key: Callable[[str], str]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for choice in decided.choices:
        entry = sums.setdefault(key(choice.layer), {"layers": 0, "weights": 0, "fp16_bytes": 0, "bytes": 0})
        weights = math.prod(choice.shape)
        for name, count in (
            ("layers", 1),
            ("weights", weights),
            ("fp16_bytes", 2 * weights),
            ("bytes", choice.nbytes),
        ):
            entry[name] += count
    return sums


def _by_format(decided: Plan) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"layers": 0, "weights": 0, "bytes": 0})
    for choice in decided.choices:
        sums[choice.format]["layers"] += 1
        sums[choice.format]["weights"] += math.prod(choice.shape)
        sums[choice.format]["bytes"] += choice.nbytes
    return dict(sums)


def show_plan(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the plan for a person: bytes per component, per group of layers and per format."""
    for title, key in (("component", "components"), ("group of layers", "groups")):
        table = Table(title=None, header_style="bold")
        table.add_column(title)
        for column in ("layers", "weights", "fp16", "planned"):
            table.add_column(column, justify="right")
        for name, entry in summary[key].items():
            sizes = format_bytes(entry["fp16_bytes"]), format_bytes(entry["bytes"])
            table.add_row(name, str(entry["layers"]), f"{entry['weights']:,}", *sizes)
        console.print(table)
    for name, entry in summary["formats"].items():
        console.print(f"{name:14} {entry['layers']:4} layers {format_bytes(entry['bytes']):>12}", highlight=False)
    parts = ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in summary["parts"].items())
    console.print(f"{summary['average_bits']:.3f} bits per weight: {parts}", highlight=False)
    if summary["kept"]:
        console.print(f"{len(summary['kept'])} layers in floating point, {summary['kept'][0]} first", highlight=False)
    console.print(f"{'everything else':14} {format_bytes(summary['fixed_bytes']):>22}", highlight=False)
    for line in show_estimates(summary["estimated"]):
        console.print(line, highlight=False, soft_wrap=True)
    for note in summary["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    budget = summary["budget_bytes"]
    within = f" of {format_bytes(budget)} allowed" if budget else ""
    console.print(f"total {format_bytes(summary['total_bytes'])}{within}", highlight=False)
    console.print(f"smallest possible {format_bytes(summary['smallest_bytes'])}", highlight=False)
