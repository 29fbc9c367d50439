# SPDX-License-Identifier: Apache-2.0
"""What ONNX can not store compressed is refused with the layer's name and the numbers, never stored otherwise."""

import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx import program as target
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.scheme import parse_scheme


class Wrapped(ComponentModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def component_of(model: nn.Module) -> Component:
    return Component("unet", Wrapped("unet", model), {"x": torch.zeros(2, 48)}, ("y",), role="denoiser")


@pytest.fixture(scope="module")
def graph() -> target.TracedGraph:
    return target.trace(component_of(nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8))))


@pytest.mark.parametrize(
    ("name", "kind", "shape", "reason"),
    [
        ("int4-g48", "linear", (32, 96), "not 48"),
        ("int8-g8", "linear", (32, 96), "not 8"),
        ("int8-row", "linear", (32, 40), "40 columns are a multiple of 8 only"),
        ("int4-g32", "linear", (32, 48), "48 input channels are not a multiple of group 32"),
        ("int4-g32", "conv2d", (32, 4, 3, 3), "4 input channels are not a multiple of group 32"),
        ("avq2x6-d4", "linear", (32, 96), "codes of 8 bits, avq2x6-d4 has 6"),
        ("avq2x8-d8", "conv2d", (32, 4, 3, 3), "4 input channels are not a multiple of vector length 8"),
        ("vq8-d4-out", "linear", (32, 96), "one codebook of vectors along the inputs, not vq8-d4-out"),
        ("vq8-d4-r16", "linear", (32, 96), "one codebook of vectors along the inputs, not vq8-d4-r16"),
    ],
)
def test_a_format_that_does_not_fit_has_a_reason_with_numbers(
    name: str, kind: str, shape: tuple[int, ...], reason: str
) -> None:
    found = Onnx().storable(parse_scheme(name), kind, shape)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("int4-g48", "conv2d", (32, 96, 3, 3)),
        ("int8-row", "conv2d", (5, 7, 3, 3)),
        ("int4-g16", "linear", (1, 48)),
        ("fp16", "linear", (3, 5)),
        ("fp32", "conv2d", (3, 5, 1, 1)),
        ("vq8-d2", "conv2d", (3, 4, 3, 3)),
        ("avq4x8-d8", "linear", (3, 8)),
    ],
)
def test_a_format_that_fits_has_none(name: str, kind: str, shape: tuple[int, ...]) -> None:
    assert Onnx().storable(parse_scheme(name), kind, shape) is None


class _Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(8, 48))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.tanh(self.direction))


def test_a_layer_whose_weight_is_computed_is_refused() -> None:
    with pytest.raises(TurbopocketError, match="is computed, not stored"):
        target.trace(component_of(_Computed()))
