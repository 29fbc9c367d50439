# SPDX-License-Identifier: Apache-2.0
"""Which formats a layer may have, and what plans of all sizes would cost."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ...ground.errors import TurbopocketError
from ...quant.formats import LayerFormat, parse_format
from ...quant.plan import LayerChoices, Plan, plan, smallest_total_bytes, tradeoff
from ..targets.base import Target
from ..targets.layer import kind_of

CURVE_POINTS = 17


def candidate_formats(
    target: Target, shapes: Mapping[str, tuple[int, ...]], formats: Sequence[str], pins: Mapping[str, str]
) -> dict[str, list[LayerFormat]]:
    """Returns, for each layer, the wanted formats, and those it is pinned to, that the target can store for its shape.

    Raises TurbopocketError with every reason when a layer is left without any.
    """
    kept: dict[str, list[LayerFormat]] = {}
    for name, shape in shapes.items():
        pinned = [text for glob, text in pins.items() if fnmatchcase(name, glob)]
        wanted = [parse_format(text) for text in dict.fromkeys([*formats, *pinned])]
        reasons = {each: target.storable(each, kind_of(shape), shape) for each in wanted}
        kept[name] = [each for each, reason in reasons.items() if reason is None]
        if not kept[name]:
            why = "; ".join(str(reason) for reason in reasons.values())
            raise TurbopocketError(f"{name}: no format left for shape {list(shape)}: {why}", hint="allow fp16 as well")
    return kept


def curve(layers: Sequence[LayerChoices], fixed_bytes: int, pins: Mapping[str, str]) -> list[Plan]:
    """Returns plans from the smallest possible to the best possible, evenly spaced in bytes."""
    smallest = smallest_total_bytes(layers, fixed_bytes, pins)
    largest = plan(layers, None, fixed_bytes, pins).total_bytes
    step = (largest - smallest) / (CURVE_POINTS - 1)
    budgets = [math.ceil(smallest + step * index) for index in range(CURVE_POINTS)]
    return tradeoff(layers, budgets, fixed_bytes, pins)
