# SPDX-License-Identifier: Apache-2.0
"""What each component of an artifact will take of a device's memory at its peak, from shapes and schemes alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...quant.peak import ComponentMemory, ComponentPeak, LayerMemory, PeakMemory
from ...quant.plan import BUDGET, LayerChoices, Plan
from ...quant.scheme import parse_scheme
from ..targets.base import Target
from ..targets.layer import Layer, LayerBytes, kind_of
from ..units import format_bytes
from .forecast_work import ComponentWork, LayerWork


def peak_memory(
    target: Target,
    works: Mapping[str, ComponentWork],
    choices: Mapping[str, LayerChoices],
    allowed_bytes: int | None = None,
) -> PeakMemory:
    """What components take at their peaks in the schemes that their layers may have, of which they may take so much.

    `works` are of the largest picture. A layer that is in no choices is not run.
    """
    return PeakMemory({name: _peak(target, work, choices) for name, work in works.items()}, allowed_bytes)


def limits_line(decided: Plan, bound: Sequence[str]) -> str:
    """Says which limits hold a plan back, of those that it has; `bound` is as `bound_by` gives it."""
    limits = []
    if decided.budget_bytes is not None:
        limits.append((f"budget ({_of(decided.total_bytes, decided.budget_bytes)})", BUDGET in bound))
    for name, each in decided.memory.items() if decided.peak_memory_bytes is not None else ():
        limits.append((f"peak_memory of {name} ({_of(each.peak, decided.peak_memory_bytes)})", name in bound))
    binding = [text for text, binds in limits if binds]
    if not binding:
        return "no limit binds: every layer has its scheme of least loss"
    return f"what binds: {' and '.join(binding)}"


def memory_lines(decided: Plan) -> list[str]:
    """What drawing takes of the device, for a person: a line for each component, which are open in turn."""
    allowed = decided.peak_memory_bytes
    within = "" if allowed is None else f" of {format_bytes(allowed)} allowed"
    return [
        f"{name:<21} {format_bytes(each.peak):>10} of memory at its peak{within}: {format_bytes(each.held)} held, "
        f"{format_bytes(each.running)} to compute with"
        for name, each in decided.memory.items()
    ]


def _of(taken: int, allowed: int | None) -> str:
    return f"{format_bytes(taken)} of {format_bytes(allowed or 0)}"


def _peak(target: Target, work: ComponentWork, choices: Mapping[str, LayerChoices]) -> ComponentPeak:
    layers = {layer.name: layer for layer in work.layers if layer.name in choices}
    taken = {name: _by_scheme(target, layer, choices[name].schemes) for name, layer in layers.items()}
    alive = np.array(work.alive, dtype=np.int64)
    weights = _kept_weights(list(layers.values()), taken)
    for begins, ends, nbytes in weights.values():
        alive[begins:ends] += nbytes
    own = target.component_memory(work.work.operators, work.norms, work.others, work.others_bytes, work.table_bytes)
    between = np.delete(alive, [moment for each in layers.values() for moment in range(each.begins, each.ends)])
    return ComponentPeak(
        ComponentMemory(own, int(between.max(initial=0))),
        {
            name: {scheme: _running(layer, each, alive, weights) for scheme, each in taken[name].items()}
            for name, layer in layers.items()
        },
    )


def _running(
    layer: LayerWork, taken: LayerBytes, alive: NDArray[np.int64], weights: Mapping[tuple[int, ...], tuple[int, ...]]
) -> LayerMemory:
    """What is alive while a layer runs: the buffer of its weight may be among those that are kept."""
    at_most = int(alive[max(0, layer.begins - 1) : layer.ends].max(initial=0))
    kept = taken.kept and layer.shape in weights
    return LayerMemory(taken.held, at_most + (taken.again if kept else taken.scratch))


def _kept_weights(
    layers: Sequence[LayerWork], taken: Mapping[str, Mapping[str, LayerBytes]]
) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """By shape, from when to when a runtime keeps a buffer for dense weights, and its bytes: where several layers of
    that shape have one in some scheme, from the first of these layers to the last."""
    found: dict[tuple[int, ...], list[LayerWork]] = {}
    for layer in layers:
        if any(each.kept for each in taken[layer.name].values()):
            found.setdefault(layer.shape, []).append(layer)
    return {
        shape: (min(each.begins for each in own), max(each.ends for each in own), 4 * own[0].weights)
        for shape, own in found.items()
        if len(own) > 1
    }


def _by_scheme(target: Target, work: LayerWork, schemes: Sequence[str]) -> dict[str, LayerBytes]:
    layer = Layer(work.name, kind_of(work.shape), work.shape)
    return {scheme: target.layer_memory(layer, parse_scheme(scheme), work) for scheme in schemes}
