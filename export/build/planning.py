# SPDX-License-Identifier: Apache-2.0
"""The best plan whose files fit the budget, every byte counted that is not a layer's weight, and that memory holds."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...ground.errors import OverBudget
from ...quant.compress import decompressed
from ...quant.finetune import stand_ins
from ...quant.observe import LayerStats
from ...quant.peak import PeakMemory
from ...quant.plan import LayerChoices, Plan, bound_by, bytes_at, plan, refuse_over_budget, smallest_total_bytes
from ...quant.scheme import Scheme
from ...quant.sensitivity import estimate_from_shapes
from ...quant.split import SHARES, different, split_plan
from ..families.components import shapes_of
from .bench import Workbench, traced, with_ranges
from .candidates import resolved, with_schemes
from .forecast_work import ComponentWork
from .manifest import expected_manifest_bytes, folder_bytes
from .peak import limits_line, peak_memory

PASSES = 3
"""How often schemes are chosen anew, with what the files of the last choice need."""


def proposals(
    bench: Workbench,
    works: Mapping[str, ComponentWork],
    stats: Mapping[str, LayerStats],
    choices: Mapping[str, LayerChoices],
    content: Mapping[str, LayerChoices],
    artifact: Path,
) -> list[Plan]:
    """The plan for graphs as they are; before fine-tuning, for graphs whose norms and biases all differ, since a graph
    keeps equal ones once, and tuned ones are not equal.

    More where `content` are other losses of some layers: one for each division of the budget, after that of least loss
    of quality alone.
    """
    if not bench.recipe.moves_vectors:
        return _plans_for(bench, works, choices, content, artifact)
    with decompressed(bench.modules, stand_ins(bench.modules)):
        graphs = traced(bench.target, bench.components, bench.progress, "trace for fine-tuning")
        return _plans_for(with_ranges(replace(bench, traced=graphs), stats), works, choices, content, artifact)


def refuse_impossible(bench: Workbench, works: Mapping[str, ComponentWork], artifact: Path) -> None:
    """Raises OverBudget when not even the smallest schemes fit: bytes and memory need no losses, so before anything is
    drawn.

    Where scales of activations come from calibration, nothing is told yet: which layers have them is part of the bytes.
    """
    shapes = shapes_of(bench.layers)
    whole = resolved(bench.target, shapes, bench.candidates)
    limits = bench.recipe.compress.budget_bytes, bench.recipe.compress.peak_memory_bytes
    if limits == (None, None) or any(each.is_static for own in whole.values() for each in own):
        return
    _plans_for(bench, works, with_schemes(estimate_from_shapes(shapes, bench.formats), whole), {}, artifact)


def tell_limits(
    bench: Workbench, works: Mapping[str, ComponentWork], choices: Mapping[str, LayerChoices], decided: Plan
) -> None:
    """Says which limit holds the plan back, where memory has one."""
    compression = bench.recipe.compress
    if compression.peak_memory_bytes is not None:
        memory = peak_memory(bench.target, works, choices, compression.peak_memory_bytes)
        bound = bound_by(list(choices.values()), decided, compression.pin, memory)
        bench.progress.remark(f"note: {limits_line(decided, bound)}")


def _plans_for(
    bench: Workbench,
    works: Mapping[str, ComponentWork],
    choices: Mapping[str, LayerChoices],
    content: Mapping[str, LayerChoices],
    artifact: Path,
) -> list[Plan]:
    compression, target, graphs = bench.recipe.compress, bench.target, bench.traced.values()
    to_come = [path for spec in bench.draft.components.values() for path in target.files(spec)]
    small = folder_bytes(artifact)
    memory = peak_memory(target, works, choices, compression.peak_memory_bytes)
    limited = compression.peak_memory_bytes is not None
    small += expected_manifest_bytes(bench.draft, choices, to_come, target.runtime_names, artifact, limited)

    def file_bytes(schemes: Mapping[str, Scheme]) -> int:
        return small + sum(
            target.lowered_bytes(graph, {name: schemes[name] for name in graph.layers}) for graph in graphs
        )

    first = small + sum(target.fixed_bytes(graph, bench.candidates) for graph in graphs)
    layers, budget, pins = list(choices.values()), compression.budget_bytes, compression.pin

    def divided(share: float) -> Propose:
        def propose(allowed: int | None, fixed: int) -> Plan:
            if allowed is None and not limited:
                return plan(layers, None, fixed, pins, memory)
            most = fixed + sum(max(each.nbytes for each in layer.candidates) for layer in layers)
            return split_plan(layers, content, share, most if allowed is None else allowed, fixed, pins, memory)

        return propose

    shares = SHARES if content else ()
    if compression.average_bits is not None:
        allowed = bytes_at(layers, compression.average_bits)
        of_layers = [plan(layers, allowed, 0, pins, memory)]
        for share in shares:
            with suppress(OverBudget):  # a division that memory has no room for
                of_layers.append(divided(share)(allowed, 0))
        return [_with_exact_bytes(each, file_bytes) for each in different(of_layers)]
    found = [best_fitting(layers, budget, pins, first, file_bytes, memory)]
    for share in shares:
        with suppress(OverBudget):
            found.append(best_fitting(layers, budget, pins, first, file_bytes, memory, divided(share)))
    return different(found)


def _with_exact_bytes(proposed: Plan, file_bytes: Callable[[Mapping[str, Scheme]], int]) -> Plan:
    """A plan of layers alone as one of all files, which have no limit."""
    fixed = file_bytes(proposed.schemes) - sum(choice.nbytes for choice in proposed.choices)
    return replace(proposed, budget_bytes=None, fixed_bytes=fixed)


Propose = Callable[[int | None, int], Plan]
"""A plan within so many bytes, or any number, of which so many are fixed."""


def best_fitting(
    layers: Sequence[LayerChoices],
    budget_bytes: int | None,
    pins: Mapping[str, str],
    fixed_bytes: int,
    file_bytes: Callable[[Mapping[str, Scheme]], int],
    memory: PeakMemory | None = None,
    propose: Propose | None = None,
) -> Plan:
    """The plan of least loss, of those tried, whose files fit the budget; its `fixed_bytes` are exact.

    How many bytes there are beside the layers' weights depends on the schemes: a graph needs more nodes for some,
    codebooks are shared by layers. So the first pass takes `fixed_bytes`, and each later one what `file_bytes` counts
    for the schemes of the pass before it. If none of the plans fits, one is made with the largest count so far, and
    then the smallest of all. Raises OverBudget when that does not fit either. Plans are those that `propose` makes, by
    default of least loss within what `memory` allows.
    """
    propose = propose or (lambda allowed, fixed: plan(layers, allowed, fixed, pins, memory))
    tried: list[Plan] = []

    def attempt(fixed: int, allowed: int | None) -> int:
        proposed = propose(allowed, fixed)
        exact = file_bytes(proposed.schemes) - sum(choice.nbytes for choice in proposed.choices)
        tried.append(replace(proposed, budget_bytes=budget_bytes, fixed_bytes=exact))
        return exact

    def fitting() -> list[Plan]:
        return [each for each in tried if budget_bytes is None or each.total_bytes <= budget_bytes]

    with suppress(OverBudget):  # what is counted at most may be too much where the files are not
        for _ in range(PASSES):
            fixed_bytes = attempt(fixed_bytes, budget_bytes)
        if not fitting():
            attempt(max(each.fixed_bytes for each in tried), budget_bytes)
    if not fitting():
        attempt(0, smallest_total_bytes(layers, 0, pins, memory))
    best = min(fitting() or tried[-1:], key=lambda each: (each.predicted_loss, each.total_bytes))
    if budget_bytes is not None:
        refuse_over_budget(best.total_bytes, best.fixed_bytes, budget_bytes)
    return best
