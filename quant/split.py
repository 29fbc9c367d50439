# SPDX-License-Identifier: Apache-2.0
"""A budget divided between two kinds of layers, whose losses are of two units: MixDQ's metric decoupling.

Zhao et al., MixDQ (2024), arXiv 2405.17873: layers that decide what is in a picture (feed-forward and cross-attention)
are judged by its content, the others by its quality. No exchange rate between the two is known, so each kind gets a
share of the bytes and a program of its own, and pictures tell which share is best.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from ..ground.errors import TurbopocketError
from .peak import PeakMemory
from .plan import Choice, LayerChoices, Plan, apply_pins, plan, smallest_total_bytes, with_memory

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def split_plan(
    layers: Sequence[LayerChoices],
    content: Mapping[str, LayerChoices],
    share: float,
    budget_bytes: int,
    fixed_bytes: int,
    pins: Mapping[str, str] | None = None,
    memory: PeakMemory | None = None,
) -> Plan:
    """The plan in which layers named in `content` get that share of what is left when every layer is smallest.

    `layers` have losses of quality, `content` those of content for the same candidates; each kind is of least loss of
    its own. Bytes that a kind does not need go to the other. Predicted losses are those of quality. Of what `memory`
    leaves to a component, content gets the same share, and the others what it did not take.
    Raises OverBudget like `plan`, also where this division does not fit in memory, and TurbopocketError when `content`
    names a layer that there is not.
    """
    if strangers := set(content) - {layer.layer for layer in layers}:
        raise TurbopocketError(f"{min(strangers)} is not among the layers to plan")
    allowed = apply_pins(layers, pins or {})
    judged = apply_pins([content.get(layer.layer, layer) for layer in layers], pins or {})
    kinds = {True: [each for each in judged if each.layer in content]}
    kinds[False] = [each for each in judged if each.layer not in content]
    least = {kind: smallest_total_bytes(own, 0) for kind, own in kinds.items()}
    most = {kind: plan(own, None, 0).total_bytes if own else 0 for kind, own in kinds.items()}
    spare = budget_bytes - fixed_bytes - sum(least.values())
    if spare < 0:
        return plan(allowed, budget_bytes, fixed_bytes)  # says by how much
    given = {True: int(share * spare)}
    given[False] = spare - given[True]
    for kind in (True, False):
        left = max(0, given[kind] - (most[kind] - least[kind]))
        given[kind], given[not kind] = given[kind] - left, given[not kind] + left
    schemes: dict[str, str] = {}
    for kind, own in kinds.items():
        if own:
            room = _room(memory, allowed, own, schemes, share if kind else 1.0)
            found = plan(own, least[kind] + given[kind], 0, memory=room)
            schemes |= {each.layer: each.scheme for each in found.choices}
    found = Plan(_chosen(allowed, schemes), fixed_bytes, budget_bytes)
    return found if memory is None else with_memory(found, memory)


def _room(
    memory: PeakMemory | None,
    layers: Sequence[LayerChoices],
    own: Sequence[LayerChoices],
    decided: Mapping[str, str],
    share: float,
) -> PeakMemory | None:
    """What layers of one kind may take when others are decided, or take least: this share of what that leaves.

    None where there is no limit.
    """
    if memory is None or memory.allowed_bytes is None:
        return None
    names = {each.layer for each in own}
    others = {name: each for name, each in memory.least_schemes(layers).items() if name not in names} | dict(decided)
    components = {name: each.with_chosen(others) for name, each in memory.components.items()}
    room = PeakMemory(components, memory.allowed_bytes)
    kept_back = {
        name: round((1 - share) * (memory.allowed_bytes - each.peak)) for name, each in room.least(own).items()
    }
    return PeakMemory({name: each.with_more(kept_back[name]) for name, each in components.items()}, room.allowed_bytes)


def different(plans: Sequence[Plan]) -> list[Plan]:
    """The plans without those whose schemes are another one's, in their order."""
    return list({tuple(choice.scheme for choice in each.choices): each for each in reversed(plans)}.values())[::-1]


def _chosen(layers: Sequence[LayerChoices], schemes: Mapping[str, str]) -> tuple[Choice, ...]:
    chosen = []
    for layer in layers:
        candidate = next(each for each in layer.candidates if each.scheme == schemes[layer.layer])
        chosen.append(Choice(layer.layer, layer.shape, candidate.scheme, candidate.nbytes, candidate.loss))
    return tuple(chosen)


def content_of(names: Collection[str], globs: Sequence[str]) -> set[str]:
    """Names of the layers that one of the globs matches. Raises TurbopocketError for one that matches none."""
    found: set[str] = set()
    for glob in globs:
        matched = {name for name in names if fnmatchcase(name, glob)}
        if not matched:
            raise TurbopocketError(f"content {glob!r} matches no layer")
        found |= matched
    return found
