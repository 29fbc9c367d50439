# SPDX-License-Identifier: Apache-2.0
"""A limit of memory on the device, from the recipe to what a runner holds open."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from turbopocket.export.build.forecast_alive import Buffers
from turbopocket.export.build.peak import limits_line
from turbopocket.export.plan import Planned, plan
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import OverBudget, TurbopocketError
from turbopocket.quant.peak import ComponentMemory
from turbopocket.quant.plan import Plan

FORMATS = ["int8-row", "int4-row", "fp16"]


def planned(**compress: Any) -> Planned:
    return plan(make_recipe({"compress": {"formats": FORMATS, **compress}}, "test"))


def peaks(found: Planned) -> dict[str, int]:
    return {name: each.peak for name, each in found.plan.memory.items()}


@pytest.fixture(scope="module")
def free() -> Planned:
    return planned()


def test_a_limit_changes_the_component_that_it_binds_and_no_other(free: Planned) -> None:
    assert free.bound_by == ()
    largest = max(peaks(free), key=lambda name: peaks(free)[name])
    assert largest == "unet"
    allowed = round(0.8 * peaks(free)["unet"])
    found = planned(peak_memory=f"{allowed}B")
    assert found.plan.peak_memory_bytes == allowed
    assert peaks(found)["unet"] <= allowed
    assert found.bound_by == ("unet",)
    same = {layer: scheme for layer, scheme in free.layers.items() if not layer.startswith("unet.")}
    assert {layer: found.layers[layer] for layer in same} == same
    assert found.plan.predicted_loss > free.plan.predicted_loss
    told = found.summary()
    assert json.loads(json.dumps(told)) == told
    assert told["memory"]["unet"]["held"] + told["memory"]["unet"]["running"] == peaks(found)["unet"]


def test_bytes_and_memory_are_both_kept(free: Planned) -> None:
    allowed, budget = round(0.8 * peaks(free)["unet"]), round(0.6 * free.total_bytes)
    found = planned(peak_memory=f"{allowed}B", budget=f"{budget}B")
    assert found.total_bytes <= budget
    assert max(peaks(found).values()) <= allowed
    bits = planned(peak_memory=f"{allowed}B", average_bits=8)
    assert max(peaks(bits).values()) <= allowed


def test_a_limit_that_can_not_be_kept_is_one_sentence(turbopocket: Callable[..., Any]) -> None:
    with pytest.raises(OverBudget, match=r"^unet is predicted to take at least [\d,]+ bytes of memory at its peak"):
        planned(peak_memory="1MB")
    told = turbopocket("plan", "--formats", "int4-row", "--peak-memory", "1MB", "--json")
    assert told.code == 2
    assert "over the 1,000,000 bytes that peak_memory allows" in json.loads(told.out)["error"]
    for text in ("1", "much"):
        wrong = turbopocket("plan", "--peak-memory", text)
        assert (wrong.code, "peak_memory" in wrong.err) == (1, True)
    with pytest.raises(TurbopocketError, match="peak_memory '8' is not a number with a unit"):
        planned(peak_memory="8")


def test_what_binds_is_told() -> None:
    memory = {"unet": ComponentMemory(900, 100), "vae_decoder": ComponentMemory(10, 20)}
    decided = Plan((), 500, 600, memory, 1000)
    assert limits_line(decided, ()) == "no limit binds: every layer has its scheme of least loss"
    assert limits_line(decided, ("budget",)) == "what binds: budget (500 B of 600 B)"
    both = limits_line(decided, ("budget", "unet"))
    assert both == "what binds: budget (500 B of 600 B) and peak_memory of unet (1.00 kB of 1.00 kB)"


def test_a_person_is_told_of_memory_by_component(turbopocket: Callable[..., Any]) -> None:
    told = turbopocket("plan", "--formats", "int4-row", "--peak-memory", "1GB").out
    assert "of memory at its peak of 1.000 GB allowed: " in told
    assert "no limit binds" in told


def test_tensors_are_alive_from_when_they_come_to_when_they_go() -> None:
    buffers = Buffers()
    first = buffers.come("a", 10)
    second = buffers.come("b", 5)
    buffers.go(first)
    buffers.come("a", 10)
    buffers.go(second)
    assert buffers.alive() == [10, 15, 5, 15, 10, 0]


def test_what_is_made_value_by_value_takes_the_place_of_what_goes() -> None:
    buffers = Buffers()
    first = buffers.come("a", 10)
    second = buffers.come("a", 10, over=first)
    buffers.go(first)
    buffers.come("a", 10, over=second)
    buffers.come("b", 1)
    buffers.go(second)
    assert buffers.alive() == [10, 10, 10, 20, 21, 11, 0]  # the second is read once more
