# SPDX-License-Identifier: Apache-2.0
"""Which schemes a layer may have, and what plans of all sizes would cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice

from ...ground.errors import TurbopocketError
from ...quant.layer_rounding import activations_name
from ...quant.plan import Candidate, LayerChoices, Plan, plan, smallest_total_bytes, stands_for, tradeoff
from ...quant.ranges import Ranges
from ...quant.scheme import Scheme, parse_scheme
from ..targets.base import NO_RANGES, Target
from ..targets.layer import kind_of

CURVE_POINTS = 17
PLAIN = ("fp16", "fp32")
"""Formats that fit any shape; a target has one of them."""


def candidate_schemes(
    target: Target, shapes: Mapping[str, tuple[int, ...]], schemes: Sequence[str], pins: Mapping[str, str]
) -> dict[str, list[Scheme]]:
    """Returns, for each layer, the wanted schemes as far as the target can store them.

    Of a pinned layer, its pin, and where that is a weight format the wanted schemes of that: others would be fitted and
    measured for nothing. They are as they were asked for: `resolved` says what becomes of a weight format that says
    nothing of activations.
    Raises TurbopocketError with every reason when a layer is left without any.
    """
    kept: dict[str, list[Scheme]] = {}
    for name, shape in shapes.items():
        pinned = [text for glob, text in pins.items() if fnmatchcase(name, glob)][-1:]
        allowed = [text for text in schemes if all(stands_for(pin, text) for pin in pinned)]
        wanted = [parse_scheme(text) for text in dict.fromkeys([*pinned, *allowed])]
        reasons = {each: target.storable(each, kind_of(shape), shape) for each in wanted}
        kept[name] = [each for each, reason in reasons.items() if reason is None]
        if not kept[name]:
            why = "; ".join(str(reason) for reason in reasons.values())
            fitting = (each for each in PLAIN if target.storable(parse_scheme(each), kind_of(shape), shape) is None)
            hint = "".join(f"pin it to {each}" if pinned else f"allow {each} as well" for each in islice(fitting, 1))
            raise TurbopocketError(f"{name}: no format left for shape {list(shape)}: {why}", hint=hint or None)
    return kept


def with_floats(
    target: Target, shapes: Mapping[str, tuple[int, ...]], candidates: Mapping[str, Sequence[Scheme]]
) -> dict[str, list[Scheme]]:
    """Returns the candidates, and each one that rounds activations once more as the weight format alone, where the
    target runs that as it is."""

    def float_schemes(name: str, schemes: Sequence[Scheme]) -> list[Scheme]:
        kind = kind_of(shapes[name])
        plain = [Scheme(each.weight) for each in schemes if not each.is_weight_only]
        return [
            each
            for each in plain
            if target.resolved(name, each, kind) == each and target.storable(each, kind, shapes[name]) is None
        ]

    return {name: list(dict.fromkeys([*own, *float_schemes(name, own)])) for name, own in candidates.items()}


def exempted(choices: Mapping[str, LayerChoices], share: float, pins: Mapping[str, str]) -> dict[str, LayerChoices]:
    """Returns choices in which that share of the layers keep floats, and no other does in a format that can be rounded.

    Of layers with candidates that store a weight alike with and without rounding, and no pin, those whose roundings
    lose most, the least of their own counted. MixDQ (Zhao et al. 2024, arXiv 2405.17873) leaves about one in a hundred
    out. No byte pays for rounding, so a plan would never choose it.
    """
    twins = {name: _float_twins(each) for name, each in choices.items()} if share else {}
    free = [name for name, own in twins.items() if own and not any(fnmatchcase(name, glob) for glob in pins)]
    worst_first = sorted(free, key=lambda name: -min(choices[name].roundings.values(), default=0.0))
    kept = set(worst_first[: round(share * len(choices))])

    def left(name: str, candidate: Candidate) -> bool:
        return "+" not in candidate.scheme if name in kept else candidate.scheme not in twins[name]

    narrowed_to = {name: tuple(c for c in choices[name].candidates if left(name, c)) for name in free}
    return {
        name: replace(each, candidates=narrowed_to[name]) if name in narrowed_to else each
        for name, each in choices.items()
    }


def _float_twins(layer: LayerChoices) -> set[str]:
    """Candidates without rounding whose weight is stored as that of one with it."""
    schemes = {candidate.scheme for candidate in layer.candidates}
    return {scheme.partition("+")[0] for scheme in schemes if "+" in scheme} & schemes


def narrowed(choices: Mapping[str, LayerChoices], like: Mapping[str, LayerChoices]) -> dict[str, LayerChoices]:
    """Returns choices with those candidates only that the same layers have in `like`."""
    left = {name: {candidate.scheme for candidate in each.candidates} for name, each in like.items()}
    return {
        name: replace(each, candidates=tuple(c for c in each.candidates if c.scheme in left[name]))
        for name, each in choices.items()
    }


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
    """Returns choices that were measured by weight format and by rounding of activations, for these candidates.

    A scheme's loss is the sum of its two; a rounding that was not measured, as nothing is decided about it, counts for
    none.
    """
    named = {}
    for name, layer in choices.items():
        measured = {candidate.scheme: candidate for candidate in layer.candidates}
        schemes = []
        for each in candidates[name]:
            of_weight = measured[str(each.weight)]
            loss = of_weight.loss + layer.roundings.get(activations_name(each), 0.0)
            schemes.append(replace(of_weight, scheme=str(each), loss=loss))
        named[name] = replace(layer, candidates=tuple(schemes))
    return named


def curve(layers: Sequence[LayerChoices], fixed_bytes: int, pins: Mapping[str, str]) -> list[Plan]:
    """Returns plans from the smallest possible to the best possible, evenly spaced in bytes."""
    smallest = smallest_total_bytes(layers, fixed_bytes, pins)
    largest = plan(layers, None, fixed_bytes, pins).total_bytes
    step = (largest - smallest) / (CURVE_POINTS - 1)
    budgets = [math.ceil(smallest + step * index) for index in range(CURVE_POINTS)]
    return tradeoff(layers, budgets, fixed_bytes, pins)
