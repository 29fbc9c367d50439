# SPDX-License-Identifier: Apache-2.0
"""Plans within a limit of memory at the peak, against brute force."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopocket.ground.errors import OverBudget
from turbopocket.quant import knapsack
from turbopocket.quant.peak import ComponentMemory, ComponentPeak, LayerMemory, PeakMemory
from turbopocket.quant.plan import Candidate, LayerChoices, Plan, bound_by, plan, smallest_total_bytes
from turbopocket.quant.split import SHARES, split_plan

SOLVER_GAP = 1.0001
OWN = ComponentMemory(13, 5)
Drawn = list[list[tuple[int, float, int, int]]]

options = st.tuples(st.integers(1, 60), st.floats(1e-3, 1e3), st.integers(0, 60), st.integers(0, 90))
drawn_layers = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)
quick = settings(max_examples=80, deadline=None)


def made(drawn: Drawn, allowed: int | None = None) -> tuple[list[LayerChoices], PeakMemory]:
    """Layers of two components in turn, whose candidates have bytes, loss, held and running memory."""
    names = [f"{'unet' if index % 2 else 'vae_decoder'}.{index}" for index in range(len(drawn))]
    layers = [
        LayerChoices(
            name, (1, 1), tuple(Candidate(f"f{at}", nbytes, loss) for at, (nbytes, loss, *_) in enumerate(own))
        )
        for name, own in zip(names, drawn, strict=True)
    ]
    memory = {
        name: {f"f{at}": LayerMemory(held, running) for at, (_, _, held, running) in enumerate(own)}
        for name, own in zip(names, drawn, strict=True)
    }
    components = {
        component: ComponentPeak(OWN, {name: own for name, own in memory.items() if name.startswith(component)})
        for component in ("vae_decoder", "unet")
    }
    return layers, PeakMemory(components, allowed)


def every_plan(layers: list[LayerChoices], memory: PeakMemory) -> list[tuple[int, int, float]]:
    """Bytes, peak and loss of each way to choose; the peak is that of the component that takes most."""
    found = []
    for combination in itertools.product(*(layer.candidates for layer in layers)):
        schemes = {layer.layer: each.scheme for layer, each in zip(layers, combination, strict=True)}
        peak = 0
        for component in memory.components.values():
            own = [component.layers[name][schemes[name]] for name in component.layers]
            moment = max([component.own.running, *(each.running for each in own)])
            peak = max(peak, component.own.held + sum(each.held for each in own) + moment)
        found.append((sum(each.nbytes for each in combination), peak, sum(each.loss for each in combination)))
    return found


def peak_of(found: Plan) -> int:
    return max(each.peak for each in found.memory.values())


@quick
@given(drawn_layers, st.integers(0, 120), st.integers(0, 120))
def test_both_limits_hold_and_the_loss_is_that_of_brute_force(drawn: Drawn, spare: int, room: int) -> None:
    layers, free = made(drawn)
    ways = every_plan(layers, free)
    allowed = min(peak for _, peak, _ in ways) + room
    memory = PeakMemory(free.components, allowed)
    budget = min(nbytes for nbytes, peak, _ in ways if peak <= allowed) + spare
    found = plan(layers, budget, 0, memory=memory)
    assert found.total_bytes <= budget
    assert peak_of(found) <= allowed
    schemes = {choice.layer: choice.scheme for choice in found.choices}
    assert found.memory == memory.of(schemes)
    best = min(loss for nbytes, peak, loss in ways if nbytes <= budget and peak <= allowed)
    assert found.predicted_loss <= best * SOLVER_GAP
    assert plan(list(layers), budget, 0, memory=memory) == found


@quick
@given(drawn_layers, st.integers(0, 120))
def test_the_smallest_plan_within_memory_is_that_of_brute_force(drawn: Drawn, room: int) -> None:
    layers, free = made(drawn)
    ways = every_plan(layers, free)
    least = min(peak for _, peak, _ in ways)
    smallest = min(nbytes for nbytes, peak, _ in ways if peak <= least + room)
    memory = PeakMemory(free.components, least + room)
    assert smallest_total_bytes(layers, 7, memory=memory) == 7 + smallest
    with pytest.raises(OverBudget) as refused:
        plan(layers, smallest - 1, 0, memory=memory)
    assert f"is {smallest} bytes" in str(refused.value)


@quick
@given(drawn_layers)
def test_a_limit_below_the_least_peak_is_one_sentence_with_both_numbers(drawn: Drawn) -> None:
    layers, free = made(drawn)
    least = min(peak for _, peak, _ in every_plan(layers, free))
    with pytest.raises(OverBudget) as refused:
        plan(layers, None, 0, memory=PeakMemory(free.components, least - 1))
    assert f"is predicted to take at least {least:,} bytes" in str(refused.value)
    assert f"1 over the {least - 1:,} bytes that peak_memory allows" in str(refused.value)
    assert refused.value.exit_code == 2
    assert peak_of(plan(layers, None, 0, memory=PeakMemory(free.components, least))) == least


@quick
@given(drawn_layers, st.integers(0, 150))
def test_a_limit_that_nothing_comes_near_changes_no_plan(drawn: Drawn, spare: int) -> None:
    layers, free = made(drawn)
    budget = smallest_total_bytes(layers, 0) + spare
    without = plan(layers, budget, 0)
    assert plan(layers, budget, 0, memory=PeakMemory(free.components, 10**6)).choices == without.choices
    assert plan(layers, budget, 0, memory=free).choices == without.choices
    assert without.memory == {}


def test_a_format_of_fewer_bytes_may_take_more_memory() -> None:
    """As 4-bit codes that become 8-bit ones when they are opened: no chain of sizes."""
    drawn = [[(4, 2.0, 16, 0), (8, 1.0, 8, 0)]]
    layers, free = made(drawn)
    assert plan(layers, 4, 0, memory=free).choices[0].scheme == "f0"
    assert plan(layers, 8, 0, memory=PeakMemory(free.components, OWN.peak + 8)).choices[0].scheme == "f1"
    with pytest.raises(OverBudget, match="smallest plan within 26 bytes of peak memory is 8 bytes"):
        plan(layers, 7, 0, memory=PeakMemory(free.components, OWN.peak + 8))


def test_of_moments_the_largest_counts_and_not_their_sum() -> None:
    dense = [(8, 0.0, 8, 50), (4, 1.0, 8, 5)]
    layers, free = made([dense] * 4)
    once = OWN.held + 2 * 8 + 50
    assert peak_of(plan(layers, None, 0, memory=PeakMemory(free.components, once))) == once
    assert {each.scheme for each in plan(layers, None, 0, memory=PeakMemory(free.components, once)).choices} == {"f0"}
    assert {each.scheme for each in plan(layers, None, 0, memory=PeakMemory(free.components, once - 1)).choices} == {
        "f1"
    }


def test_limits_hold_to_the_byte_under_a_solver_that_overshoots(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, free = made([[(20, 0.0, 20, 0), (10, 1.0, 10, 0), (5, 9.0, 5, 0)]] * 4)
    solve = knapsack._milp
    monkeypatch.setattr(knapsack, "_milp", lambda kinds, limits, units: solve(kinds, limits, [u + 1 for u in units]))
    found = plan(layers, None, 0, memory=PeakMemory(free.components, OWN.peak + 25))
    assert peak_of(found) <= OWN.peak + 25


def test_it_is_said_which_limit_binds() -> None:
    layers, free = made([[(20, 0.0, 20, 0), (10, 1.0, 10, 0)]] * 4)
    wide, tight = (PeakMemory(free.components, OWN.peak + held) for held in (40, 30))
    found = [
        bound_by(layers, plan(layers, budget, 0, memory=memory), memory=memory)
        for budget, memory in ((None, wide), (50, wide), (None, tight), (45, tight))
    ]
    assert found == [(), ("budget",), ("vae_decoder", "unet"), ("budget",)]


def test_a_divided_budget_keeps_to_memory_as_well() -> None:
    layers, free = made([[(20, 0.0, 20, 9), (10, 1.0, 10, 5), (5, 9.0, 5, 5)]] * 4)
    content = {each.layer: each for each in layers[:2]}
    memory = PeakMemory(free.components, OWN.peak + 25)
    found = [split_plan(layers, content, share, 80, 0, memory=memory) for share in SHARES]
    assert all(peak_of(each) <= OWN.peak + 25 and each.total_bytes <= 80 for each in found)
    losses = [sum(choice.loss for choice in each.choices[:2]) for each in found]
    assert losses[0] > losses[-1]


def test_without_a_limit_a_divided_budget_tells_memory_and_is_divided_as_before() -> None:
    layers, memory = made([[(20, 0.0, 20, 9), (10, 1.0, 10, 5), (5, 9.0, 5, 5)]] * 4)
    content = {each.layer: each for each in layers[:2]}
    for share in SHARES:
        found = split_plan(layers, content, share, 60, 0, memory=memory)
        assert found.choices == split_plan(layers, content, share, 60, 0).choices
        assert peak_of(found) > OWN.peak


def test_memory_is_saved_with_the_plan(tmp_path: Path) -> None:
    layers, free = made([[(20, 0.0, 20, 9), (10, 1.0, 10, 5)]] * 2)
    found = plan(layers, 40, 0, memory=PeakMemory(free.components, 50))
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["memory"]["unet"] == {"held": 33, "running": 9}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_two_limits_on_a_unet_of_sdxl_size_take_seconds(share: float) -> None:
    drawn: Drawn = []
    for block in range(80):
        width = 640 if block % 8 == 0 else 1280
        for columns in (width, width, 2048, 4 * width):
            weights = width * columns
            drawn.append(
                [(weights * bits // 8, weights * 4.0**-bits / 1e3, weights * held // 8, 4 * weights * dense)
                 for bits, held, dense in ((2, 4, 1), (4, 4, 0), (8, 8, 1), (16, 16, 1))]
            )  # fmt: skip
    layers, free = made(drawn)
    least, most = (max(each.peak for each in free.least(layers).values()), sum(own[-1][2] for own in drawn) // 2)
    memory = PeakMemory(free.components, round(least + share * (most - least)))
    budget = round(1.7 * smallest_total_bytes(layers, 0, memory=memory))
    started = time.process_time()
    found = plan(layers, budget, 0, memory=memory)
    assert time.process_time() - started < 10.0
    assert found.total_bytes <= budget
    assert peak_of(found) <= math.floor(memory.allowed_bytes or 0)
