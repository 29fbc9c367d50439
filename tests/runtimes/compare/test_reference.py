# SPDX-License-Identifier: Apache-2.0
"""PyTorch behind the interface of every runtime."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.memory import anonymous_bytes
from turbopocket.runtimes.compare.reference import PyTorchRunner, TorchComponent


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their execution, and runs `twice` twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.twice = nn.Linear(4, 4)
        self.first = nn.Linear(3, 4, bias=False)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.twice(self.twice(self.first(x) + shift))
        return self.last(hidden), hidden


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = Backwards()
        self.outside = nn.Linear(2, 2)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet(x, shift)


@pytest.fixture
def runner() -> PyTorchRunner:
    return PyTorchRunner({"unet": TorchComponent(Wrapper(), ("x", "shift"), ("y", "hidden"), "unet.")})


INPUTS = {"shift": np.full(4, 0.5, dtype=np.float32), "x": np.ones((1, 3), dtype=np.float32)}


def test_inputs_are_matched_by_name_not_by_order(runner: PyTorchRunner) -> None:
    outputs = runner.run("unet", INPUTS)
    with torch.no_grad():
        y, hidden = runner.components["unet"].module(torch.ones(1, 3), torch.full((4,), 0.5))
    np.testing.assert_array_equal(outputs["y"], y)
    np.testing.assert_array_equal(outputs["hidden"], hidden)


def test_layers_are_named_without_the_wrapper(runner: PyTorchRunner) -> None:
    assert runner.layers("unet") == ["last", "twice", "first", "unused"]


def test_layers_come_back_in_execution_order(runner: PyTorchRunner) -> None:
    layers = runner.run_layers("unet", INPUTS, ["last", "twice", "first", "unused", "no.such.layer"])
    assert list(layers) == ["first", "twice", "last"]
    outputs = runner.run("unet", INPUTS)
    np.testing.assert_array_equal(layers["last"], outputs["y"])
    np.testing.assert_array_equal(layers["twice"], outputs["hidden"])


def test_hooks_are_gone_after_a_drill_down(runner: PyTorchRunner) -> None:
    shown = runner.run_layers("unet", INPUTS, ["first"])
    before = shown["first"].copy()
    runner.run("unet", INPUTS | {"x": np.zeros((1, 3), dtype=np.float32)})
    np.testing.assert_array_equal(shown["first"], before)
    assert not any(module._forward_hooks for module in runner.components["unet"].module.modules())


def test_unknown_component_and_inputs_are_refused(runner: PyTorchRunner) -> None:
    with pytest.raises(TurbopocketError, match="no component 'vae': there are unet"):
        runner.run("vae", {})
    with pytest.raises(TurbopocketError, match="unet: inputs are missing shift; expected x, shift"):
        runner.run("unet", {"x": INPUTS["x"]})


def test_a_followed_layer_hands_on_the_given_value_and_shows_its_own(runner: PyTorchRunner) -> None:
    plain = runner.run("unet", INPUTS)
    first = runner.run_layers("unet", INPUTS, ["first"])["first"]
    outputs, own = runner.run_following("unet", INPUTS, {"first": 2 * first, "no.such.layer": first})
    np.testing.assert_array_equal(own["first"], first)
    assert list(own) == ["first"]
    doubled = runner.run("unet", {**INPUTS, "x": 2 * INPUTS["x"]})  # it has no bias
    np.testing.assert_allclose(outputs["hidden"], doubled["hidden"], rtol=1e-6)
    assert not np.allclose(outputs["hidden"], plain["hidden"])
    np.testing.assert_array_equal(runner.run("unet", INPUTS)["hidden"], plain["hidden"])


def test_a_followed_value_of_another_shape_is_not_handed_on(runner: PyTorchRunner) -> None:
    outputs, _ = runner.run_following("unet", INPUTS, {"first": np.zeros((1, 7), np.float32)})
    np.testing.assert_array_equal(outputs["hidden"], runner.run("unet", INPUTS)["hidden"])


@pytest.mark.skipif(sys.platform != "linux", reason="what is freed is kept by glibc")
def test_what_a_component_freed_is_free_before_another_runs() -> None:
    pins: list[np.ndarray[Any, Any]] = []
    found: list[int] = []

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pieces = []
            for _ in range(2000):  # 200 MB in pieces that the heap holds, and small ones that stay in use
                pieces.append(np.ones(100_000, np.uint8))
                pins.append(np.ones(2_000, np.uint8))
            found.append(anonymous_bytes())
            return x

    class Next(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append(anonymous_bytes())
            return x

    runner = PyTorchRunner(
        {
            "unet": TorchComponent(Large(), ("x",), ("y",)),
            "vae_decoder": TorchComponent(Next(), ("x",), ("y",)),
        }
    )
    for component in runner.components:
        runner.run(component, {"x": np.zeros(1, np.float32)})
    assert found[0] - found[1] > 150_000_000
