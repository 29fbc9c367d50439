# SPDX-License-Identifier: Apache-2.0
"""Observations: their places, and second moments that layers share."""

import gc
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.names import CallPlace, LayerName, at_place, current_place
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.observe import OBSERVATIONS, Moment, Observation, SecondMoment

WIDTH = 6
Calls = Sequence[tuple[str, Tensor]]


class Attention(nn.Module):
    """Queries of one tensor, keys and values of another, as cross-attention has them; a bystander of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.other = (nn.Linear(WIDTH, 4) for _ in range(4))


class Counted(Observation[dict[CallPlace, int]]):
    """How many input vectors came at each place."""

    def begin(self, layer: nn.Module) -> None:
        self.found: dict[CallPlace, int] = {}

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        self.found[place] = self.found.get(place, 0) + x.numel() // WIDTH

    def value(self) -> dict[CallPlace, int]:
        return self.found


def moments(model: nn.Module, calls: Calls, *only: str) -> dict[str, Moment]:
    """Of the layers that were called, or of some of them."""

    def run() -> None:
        with torch.inference_mode():
            for name, x in calls:
                model.get_submodule(name)(x)

    stats = calibrate({"unet": model}, run, {f"unet.{name}" for name in only} or None, (SecondMoment,))
    return {LayerName.parse(name).path: each[SecondMoment] for name, each in stats.items()}


def alone(model: nn.Module, calls: Calls) -> dict[str, Moment]:
    """The same with nobody to share with: one layer at a time is watched."""
    return {name: moments(model, calls, name)[name] for name, _ in calls}


def require_equal(found: dict[str, Moment], expected: dict[str, Moment]) -> None:
    assert set(found) == set(expected)
    for name, moment in expected.items():
        assert torch.equal(found[name].hessian_KK, moment.hessian_KK), name
        assert found[name].count == moment.count


def tensors_alive() -> list[Tensor]:
    return [each for each in gc.get_objects() if type(each) is Tensor]


def sums_alive() -> int:
    """Running sums in memory."""
    return sum(each.dtype == torch.float64 and each.shape == (WIDTH, WIDTH) for each in tensors_alive())


def test_layers_that_are_fed_the_same_keep_one_sum_and_one_moment() -> None:
    model, before, alive = Attention(), sums_alive(), []

    def run() -> None:
        for seed in range(3):
            image, text = (torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 50))
            model.q(image)
            model.k(text)
            model.v(text)
            model.other(text.clone())  # the same values elsewhere are as good
            alive.append(sums_alive() - before)

    stats = calibrate({"unet": model}, run, kinds=(SecondMoment,))
    assert alive == [2, 2, 2]
    hessians = {name: layer[SecondMoment].hessian_KK.data_ptr() for name, layer in stats.items()}
    assert hessians["unet.k"] == hessians["unet.v"] == hessians["unet.other"] != hessians["unet.q"]


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_calls_gives_what_each_layer_alone_would_give(seed: int) -> None:
    """Layers join, come late, see something else, miss calls, run twice in a row: with few inputs all of it happens."""
    draw = random.Random(seed)
    inputs = [torch.randn(rows, WIDTH) for rows in (1, 2, 4, 4, 9)]
    names = ("q", "k", "v", "other")
    first = draw.sample(names, draw.randint(1, 4))
    together = [(name, x) for x in draw.choices(inputs, k=draw.randint(1, 3)) for name in first]
    astray = [(draw.choice(names), draw.choice(inputs)) for _ in range(draw.randrange(20))]
    calls = together + astray + [(name, x) for x in draw.choices(inputs, k=2) for name in draw.sample(names, 3)]
    model = Attention()
    require_equal(moments(model, calls), alone(model, calls))


def test_a_layer_that_goes_astray_gets_a_sum_of_its_own_and_the_others_go_on_sharing() -> None:
    model, inputs = Attention(), torch.randn(4, 10, WIDTH)
    calls = [(name, inputs[0]) for name in ("q", "k", "v")]
    calls += [("q", inputs[1]), ("k", inputs[2]), ("v", inputs[1])]
    calls += [(name, inputs[3]) for name in ("q", "k", "v")]
    found = moments(model, calls)
    require_equal(found, alone(model, calls))
    assert found["q"] is found["v"] is not found["k"]


def test_a_tensor_that_was_written_into_is_another() -> None:
    model, x = Attention(), torch.randn(10, WIDTH)
    first = x.clone()

    def run() -> None:
        for _ in range(2):
            model.q(x)
            x.mul_(2)
            model.k(x)

    stats = calibrate({"unet": model}, run, kinds=(SecondMoment,))
    expected = alone(model, [("q", first), ("q", 2 * first), ("k", 2 * first), ("k", 4 * first)])
    require_equal({LayerName.parse(name).path: each[SecondMoment] for name, each in stats.items()}, expected)


def test_a_group_that_waits_for_a_member_is_not_changed_by_what_the_model_writes_meanwhile() -> None:
    model, x = Attention(), torch.randn(10, WIDTH)
    second = torch.randn(10, WIDTH)
    kept = second.clone()

    def run() -> None:
        for name in ("q", "k"):
            model.get_submodule(name)(x)
        model.q(second)
        second.zero_()
        model.k(kept)

    stats = calibrate({"unet": model}, run, kinds=(SecondMoment,))
    expected = alone(model, [("q", x), ("q", kept)])["q"].hessian_KK
    assert all(torch.equal(each[SecondMoment].hessian_KK, expected) for each in stats.values())


def test_inputs_do_not_pile_up_behind_a_layer_that_runs_once() -> None:
    model, x = Attention(), torch.randn(3, WIDTH)
    calls = [("q", x), ("k", x), *(("q", torch.randn(3, WIDTH)) for _ in range(50))]
    held = []

    def run() -> None:
        for name, each in calls:
            model.get_submodule(name)(each)
            held.append(sum(each.shape == x.shape for each in tensors_alive()))

    calibrate({"unet": model}, run, kinds=(SecondMoment,))
    assert held[-1] <= held[5] + 2


def test_convolutions_share_what_they_read_alike_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Conv2d(2, 3, 3, padding=1),
            "b": nn.Conv2d(2, 5, 3, padding=1, bias=False),
            "strided": nn.Conv2d(2, 3, 3, padding=1, stride=2),
            "reflecting": nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        }
    )
    calls = [(name, x) for x in torch.randn(3, 2, 2, 5, 5) for name in model]
    found = moments(model, calls)
    require_equal(found, alone(model, calls))
    assert found["a"] is found["b"]
    assert len({id(each) for each in found.values()}) == 3


def test_an_observation_that_nobody_else_knows_is_collected_per_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBSERVATIONS, "counted", Counted)
    model = Attention()

    def run() -> None:
        model.q(torch.ones(3, WIDTH))
        with at_place(picture=1):
            for step, timestep in enumerate((799.0, 399.0)):
                for guided in (True, False):
                    with at_place(step=step, timestep=timestep, guided=guided):
                        model.q(torch.ones(2, WIDTH))

    found = calibrate({"unet": model}, run)["unet.q"][Counted]
    assert found == {CallPlace("unet"): 3} | {
        CallPlace("unet", timestep, step, guided, 1): 2
        for step, timestep in enumerate((799.0, 399.0))
        for guided in (True, False)
    }


def test_a_place_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), at_place(step=3):
        1 / 0  # noqa: B018
    assert current_place() == CallPlace()


@pytest.mark.parametrize("text", ["unet", "unet.conv_in", "unet.down_blocks.0.attentions.1.proj_in"])
def test_layer_names_parse_back(text: str) -> None:
    name = LayerName.parse(text)
    assert str(name) == text
    assert name.component == "unet"
