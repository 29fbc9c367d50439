# SPDX-License-Identifier: Apache-2.0
"""The planner against brute force, and what holds for every plan."""

import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from turbopocket.ground.errors import OverBudget, TurbopocketError
from turbopocket.quant import knapsack
from turbopocket.quant.account import account
from turbopocket.quant.formats import parse_format
from turbopocket.quant.plan import Candidate, Choice, LayerChoices, Plan, plan, smallest_total_bytes, tradeoff
from turbopocket.quant.sensitivity import estimate_from_shapes

FIXED_BYTES = 17
SOLVER_GAP = 1.0001

candidates = st.lists(
    st.tuples(st.integers(1, 60), st.floats(1e-6, 1e3)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]
)
layer_lists = st.lists(candidates, min_size=1, max_size=5).map(
    lambda drawn: [
        LayerChoices(f"unet.{index}", (1, 1), tuple(Candidate(f"f{n}", *pair) for n, pair in enumerate(pairs)))
        for index, pairs in enumerate(drawn)
    ]
)
spare_bytes = st.integers(0, 200)
quick = settings(max_examples=60, deadline=None)


def brute_force_loss(layers: list[LayerChoices], budget_bytes: int) -> float:
    combinations = itertools.product(*(layer.candidates for layer in layers))
    return min(
        sum(candidate.loss for candidate in combination)
        for combination in combinations
        if FIXED_BYTES + sum(candidate.nbytes for candidate in combination) <= budget_bytes
    )


def choice_of(layer: str, formats: dict[str, tuple[int, float]]) -> LayerChoices:
    return LayerChoices(layer, (4, 4), tuple(Candidate(name, *numbers) for name, numbers in formats.items()))


def three_layers() -> list[LayerChoices]:
    formats = {"fp16": (16, 0.0), "int8-row": (8, 1.0), "int4-row": (4, 10.0)}
    return [choice_of(f"unet.{name}", formats) for name in ("conv_in", "mid.to_q", "mid.to_k")]


@quick
@given(layer_lists, spare_bytes)
def test_plan_never_exceeds_the_budget_and_equals_brute_force(layers: list[LayerChoices], spare: int) -> None:
    budget_bytes = smallest_total_bytes(layers, FIXED_BYTES) + spare
    found = plan(layers, budget_bytes, FIXED_BYTES)
    assert found.total_bytes <= budget_bytes
    assert found.predicted_loss <= brute_force_loss(layers, budget_bytes) * SOLVER_GAP


@quick
@given(layer_lists, spare_bytes, spare_bytes)
def test_more_budget_never_gives_more_loss(layers: list[LayerChoices], spare: int, more: int) -> None:
    budget_bytes = smallest_total_bytes(layers, FIXED_BYTES) + spare
    small, large = tradeoff(layers, [budget_bytes, budget_bytes + more], FIXED_BYTES)
    assert large.predicted_loss <= small.predicted_loss
    assert plan(layers, budget_bytes + more, FIXED_BYTES).predicted_loss <= small.predicted_loss * SOLVER_GAP


@quick
@given(layer_lists, spare_bytes, st.data())
def test_pinned_layers_keep_their_format(layers: list[LayerChoices], spare: int, data: st.DataObject) -> None:
    pinned = data.draw(st.sampled_from(layers))
    pins = {pinned.layer: data.draw(st.sampled_from(pinned.candidates)).scheme}
    budget_bytes = smallest_total_bytes(layers, FIXED_BYTES, pins) + spare
    found = plan(layers, budget_bytes, FIXED_BYTES, pins)
    assert [choice.scheme for choice in found.choices if choice.layer in pins] == list(pins.values())
    assert found.total_bytes <= budget_bytes


@quick
@given(layer_lists, spare_bytes)
def test_same_input_gives_the_same_plan(layers: list[LayerChoices], spare: int) -> None:
    budget_bytes = smallest_total_bytes(layers, FIXED_BYTES) + spare
    assert plan(layers, budget_bytes, FIXED_BYTES) == plan(list(layers), budget_bytes, FIXED_BYTES)


@quick
@given(layer_lists)
def test_no_budget_gives_every_layer_its_least_loss(layers: list[LayerChoices]) -> None:
    found = plan(layers, None, FIXED_BYTES)
    assert [choice.loss for choice in found.choices] == [
        min(candidate.loss for candidate in layer.candidates) for layer in layers
    ]


def test_small_losses_are_seen_beside_huge_ones() -> None:
    # Nobody takes the loss of 1e9, and beside it the solver's absolute tolerance would swallow the others.
    layers = [
        choice_of(f"unet.{n}", {"a": (1, 1e9), "b": (5 + n, 1e-4 / (1 + n)), "c": (11 + 2 * n, 1e-6 / (1 + n))})
        for n in range(7)
    ]
    budget_bytes = smallest_total_bytes(layers, FIXED_BYTES) + 80
    assert plan(layers, budget_bytes, FIXED_BYTES).predicted_loss <= brute_force_loss(layers, budget_bytes) * SOLVER_GAP


def test_equal_layers_share_a_budget_from_the_first_on() -> None:
    found = plan(three_layers(), 8 + 4 + 4, 0)
    assert [choice.scheme for choice in found.choices] == ["int8-row", "int4-row", "int4-row"]


def test_equal_loss_goes_to_the_smaller_format() -> None:
    layers = [choice_of("unet.a", {"big": (9, 1.0), "small": (3, 1.0), "smaller": (2, 2.0)})]
    assert plan(layers, None, 0).choices[0].scheme == "small"


def test_budget_that_is_met_to_the_byte_is_used_and_one_byte_less_is_not() -> None:
    assert plan(three_layers(), 48, 0).predicted_loss == 0.0
    assert plan(three_layers(), 47, 0).predicted_loss == 1.0


def test_over_budget_names_the_smallest_total_and_the_budget() -> None:
    with pytest.raises(OverBudget, match=r"smallest plan is 1,012 bytes.* 13 over the budget of 999") as refusal:
        plan(three_layers(), 999, 1000)
    assert refusal.value.exit_code == 2
    assert refusal.value.hint


def test_pins_count_in_the_smallest_total() -> None:
    with pytest.raises(OverBudget, match="smallest plan is 24 bytes"):
        plan(three_layers(), 23, 0, {"unet.conv_in": "fp16"})


def test_glob_pins_every_layer_it_matches_and_a_later_pin_overrides() -> None:
    found = plan(three_layers(), None, 0, {"unet.*": "int4-row", "unet.mid.*": "int8-row"})
    assert [choice.scheme for choice in found.choices] == ["int4-row", "int8-row", "int8-row"]


def test_a_pinned_weight_format_has_whichever_activations_there_are() -> None:
    dynamic, static = {"int8-row+a8-dynamic": (8, 1.0)}, {"int8-row+a8-static": (8, 1.0)}
    layers = [choice_of(f"unet.{at}", {"fp32": (16, 0.0), **own}) for at, own in enumerate((dynamic, static))]
    found = plan(layers, None, 0, {"*": "int8-row"})
    assert list(map(str, found.schemes.values())) == ["int8-row+a8-dynamic", "int8-row+a8-static"]
    with pytest.raises(TurbopocketError, match=r"unet\.0: pinned to int8-row\+a8-static, its candidates are"):
        plan(layers, None, 0, {"*": "int8-row+a8-static"})


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"vae.*": "fp16"}, r"pin `vae\.\*` = fp16 matches none of the 3 layers"),
        ({"unet.conv_in": "int4-g32"}, "unet.conv_in: pinned to int4-g32, its candidates are fp16, int8-row"),
    ],
    ids=["no layer", "no such format"],
)
def test_pin_in_vain_is_refused(pins: dict[str, str], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        plan(three_layers(), None, 0, pins)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([choice_of("unet.a", {})], "unet.a: no candidate for shape"),
        ([choice_of("unet.a", {"f": (1, 1.0)})] * 2, "unet.a: listed twice"),
        ([choice_of("unet.a", {"f": (1, math.nan)})], "unet.a: f has loss nan"),
        ([choice_of("unet.a", {"f": (1, -1.0)})], "unet.a: f has loss -1"),
    ],
    ids=["no candidates", "twice", "nan", "negative"],
)
def test_choices_that_make_no_sense_are_refused(layers: list[LayerChoices], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        plan(layers, None, 0)


def test_plan_of_no_layers_is_the_fixed_bytes() -> None:
    assert plan([], 10, 10).total_bytes == 10
    with pytest.raises(OverBudget):
        plan([], 9, 10)


def test_tradeoff_returns_the_plans_in_the_order_asked_for() -> None:
    plans = tradeoff(three_layers(), [48, 12, 20, 12], 0)
    assert [each.budget_bytes for each in plans] == [48, 12, 20, 12]
    assert [each.predicted_loss for each in plans] == [0.0, 30.0, 12.0, 30.0]


def test_tradeoff_never_rises_even_where_the_solver_does_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def erring_plan(layers: list[LayerChoices], budget_bytes: int, *rest: object) -> Plan:
        return plan(layers, 12 if budget_bytes == 48 else budget_bytes, 0)

    monkeypatch.setattr("turbopocket.quant.plan.plan", erring_plan)
    small, large = tradeoff(three_layers(), [20, 48], 0)
    assert (large.predicted_loss, large.budget_bytes) == (small.predicted_loss, 48)


def test_budget_holds_to_the_byte_under_a_solver_that_overshoots(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = knapsack._milp
    monkeypatch.setattr(knapsack, "_milp", lambda kinds, limits, units: solve(kinds, limits, [u + 1 for u in units]))
    assert plan(three_layers(), 20, 0).total_bytes <= 20


def test_what_the_solver_prints_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def chatty_milp(*arguments: object, **options: object) -> object:
        os.write(1, b"tmpSolver.run();")
        return milp(*arguments, **options)

    monkeypatch.setattr(knapsack, "milp", chatty_milp)
    plan(three_layers(), 20, 0)
    print("data")
    assert capfd.readouterr() == ("data\n", "")


def test_saved_plan_loads_as_the_same_plan(tmp_path: Path) -> None:
    made = plan(three_layers(), 40, 2)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert json.loads((tmp_path / "plan.json").read_text())["total_bytes"] == made.total_bytes


def test_a_plan_of_schema_1_has_its_formats_for_schemes(tmp_path: Path) -> None:
    made = plan(three_layers(), 40, 2)
    old = made.to_json() | {"schema_version": 1}
    old["choices"] = [{("format" if key == "scheme" else key): each[key] for key in each} for each in old["choices"]]
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema_version": 3}', '{"schema_version": 2}', '{"schema_version": 1, "choices": [{}]}'],
)
def test_file_that_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(TurbopocketError, match=r"plan\.json: not a plan: ") as caught:
        Plan.load(path)
    assert ("newer" in (caught.value.hint or "")) == ("3" in text)


def sdxl_sized_shapes() -> dict[str, tuple[int, ...]]:
    """About the SDXL UNet: 70 transformer blocks of 10 layers in two widths, 51 convolutions: 2.5 G weights."""
    shapes: dict[str, tuple[int, ...]] = {"unet.conv_in": (320, 4, 3, 3)}
    for block in range(70):
        width = 640 if block < 10 else 1280
        block_shapes = [(width, width)] * 6 + [(width, 2048)] * 2 + [(8 * width, width), (width, 4 * width)]
        for index, shape in enumerate(block_shapes):
            shapes[f"unet.block{block}.{index}"] = shape
    for index in range(50):
        width = (320, 640, 1280)[index % 3]
        shapes[f"unet.resnet{index}"] = (width, (1 + index % 2) * width, 3, 3)
    return shapes


@pytest.mark.parametrize("share", [1.02, 1.4, 2.1, 2.5, 3.3])
def test_unet_of_sdxl_size_is_planned_in_seconds_from_shapes_alone(share: float) -> None:
    shapes = sdxl_sized_shapes()
    assert sum(map(math.prod, shapes.values())) > 2e9
    formats = [parse_format(name) for name in ("fp16", "int8-row", "int8-g32", "int4-row", "int4-g32")]
    candidates = {name: [each for each in formats if each.fits(shape) is None] for name, shape in shapes.items()}
    layers = list(estimate_from_shapes(shapes, candidates).values())
    budget_bytes = int(smallest_total_bytes(layers, 0) * share)
    started = time.process_time()
    found = plan(layers, budget_bytes, 0)
    assert time.process_time() - started < 10.0
    assert 0.999 * budget_bytes < found.total_bytes <= budget_bytes


def test_shared_codebooks_are_accounted_for_once_a_component() -> None:
    form = parse_format("avq2x8-d8-shared")
    layers = ("unet.a", "unet.b", "vae_decoder.a")
    found = account(Choice(name, (64, 64), str(form), form.nbytes((64, 64)), 0.0) for name in layers)
    assert found.part_bytes["codebooks"] == 2 * (2 * 256 * 8 * 2)
    assert found.part_bytes["codes"] + found.part_bytes["scale"] == 3 * form.nbytes((64, 64))
