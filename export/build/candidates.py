# SPDX-License-Identifier: Apache-2.0
"""Which schemes a layer may have, and what plans of all sizes would cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ...ground.errors import TurbopocketError
from ...quant.plan import LayerChoices, Plan, plan, smallest_total_bytes, tradeoff
from ...quant.ranges import Ranges
from ...quant.scheme import Scheme, parse_scheme
from ..targets.base import NO_RANGES, Target
from ..targets.layer import kind_of

CURVE_POINTS = 17


def candidate_schemes(
    target: Target, shapes: Mapping[str, tuple[int, ...]], schemes: Sequence[str], pins: Mapping[str, str]
) -> dict[str, list[Scheme]]:
    """Returns, for each layer, the scheme it is pinned to and the wanted ones, as far as the target can store them.

    They are as they were asked for: `resolved` says what becomes of a weight format that says nothing of activations.
    Raises TurbopocketError with every reason when a layer is left without any.
    """
    kept: dict[str, list[Scheme]] = {}
    for name, shape in shapes.items():
        pinned = [text for glob, text in pins.items() if fnmatchcase(name, glob)]
        wanted = [parse_scheme(text) for text in dict.fromkeys([*pinned[-1:], *schemes])]
        reasons = {each: target.storable(each, kind_of(shape), shape) for each in wanted}
        kept[name] = [each for each, reason in reasons.items() if reason is None]
        if not kept[name]:
            why = "; ".join(str(reason) for reason in reasons.values())
            raise TurbopocketError(f"{name}: no format left for shape {list(shape)}: {why}", hint="allow fp16 as well")
    return kept


def resolved(
    target: Target,
    shapes: Mapping[str, tuple[int, ...]],
    candidates: Mapping[str, Sequence[Scheme]],
    ranges: Mapping[str, Ranges] = NO_RANGES,
) -> dict[str, list[Scheme]]:
    """Returns the candidates as the target runs layers that saw these ranges: activations and all."""
    whole = {
        name: [target.resolved(name, each, kind_of(shapes[name]), ranges) for each in schemes]
        for name, schemes in candidates.items()
    }
    return {name: list(dict.fromkeys(schemes)) for name, schemes in whole.items()}


def with_schemes(
    choices: Mapping[str, LayerChoices], candidates: Mapping[str, Sequence[Scheme]]
) -> dict[str, LayerChoices]:
    """Returns choices that were measured by weight format, for these candidates.

    A loss is of the weight alone, so schemes that store a weight alike have the same.
    """
    named = {}
    for name, layer in choices.items():
        measured = {candidate.scheme: candidate for candidate in layer.candidates}
        schemes = [replace(measured[str(each.weight)], scheme=str(each)) for each in candidates[name]]
        named[name] = replace(layer, candidates=tuple(schemes))
    return named


def curve(layers: Sequence[LayerChoices], fixed_bytes: int, pins: Mapping[str, str]) -> list[Plan]:
    """Returns plans from the smallest possible to the best possible, evenly spaced in bytes."""
    smallest = smallest_total_bytes(layers, fixed_bytes, pins)
    largest = plan(layers, None, fixed_bytes, pins).total_bytes
    step = (largest - smallest) / (CURVE_POINTS - 1)
    budgets = [math.ceil(smallest + step * index) for index in range(CURVE_POINTS)]
    return tradeoff(layers, budgets, fixed_bytes, pins)
