# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight comes from elsewhere when they run."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import layers as quant_layers
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import (
    CompressedSource,
    TensorSource,
    compressible_layers,
    materialise,
    set_source,
    weight_from,
    weight_of,
    weight_shape,
    without_weights,
)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(x))
        return self.linear(hidden.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def plain() -> nn.Module:
    """Weights that fp16 holds exactly."""
    torch.manual_seed(0)
    return _Net().half().float().eval().requires_grad_(False)


@pytest.fixture
def sourced(plain: nn.Module) -> nn.Module:
    twin = copy.deepcopy(plain)
    for layer in compressible_layers("net", twin).values():
        set_source(layer, TensorSource(weight_of("", layer).half()))
    return twin


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, params=["kept", "made each time"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    kept: bool = request.param == "kept"
    if not kept:
        monkeypatch.setattr(quant_layers, "KEPT_BYTES", 0)
    return kept


def test_they_compute_the_same_bits_under_the_same_names(plain: nn.Module, sourced: nn.Module, x: Tensor) -> None:
    for _ in range(2):
        assert torch.equal(sourced(x), plain(x))
    assert compressible_layers("net", sourced).keys() == compressible_layers("net", plain).keys()
    assert isinstance(sourced.get_submodule("conv"), nn.Conv2d)
    found, expected = sourced.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sourced.get_parameter("conv.weight").dtype == torch.float32
    assert [p.shape for p in sourced.parameters()] == [p.shape for p in plain.parameters()]


def test_the_registered_parameter_takes_no_memory_and_is_nobodys_weight(sourced: nn.Module) -> None:
    registered = dict(sourced.named_parameters())["conv.weight"]
    assert registered.untyped_storage().nbytes() == 4
    assert registered.isnan().all()
    assert weight_shape("net.conv", sourced.get_submodule("conv")) == (8, 3, 3, 3)


def test_what_is_kept_is_bounded_and_given_back(
    sourced: nn.Module, x: Tensor, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = quant_layers._KEPT.nbytes
    conv_bytes, linear_bytes = 8 * 27 * 4, 8 * 5 * 4
    if kept:
        monkeypatch.setattr(quant_layers, "KEPT_BYTES", before + conv_bytes + linear_bytes - 1)
    sourced(x)
    assert quant_layers._KEPT.nbytes == before + (conv_bytes if kept else 0)
    layer: nn.Module = sourced.get_submodule("conv")
    assert (weight_of("", layer) is weight_of("", layer)) == kept
    set_source(layer, TensorSource(torch.zeros(8, 3, 3, 3)))
    gc.collect()
    assert quant_layers._KEPT.nbytes == before


def test_kept_weights_serve_gradients_though_made_without(sourced: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        sourced(x)
    x = x.clone().requires_grad_()
    sourced(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


@pytest.mark.parametrize("before", ["plain", "sourced"])
def test_a_weight_of_the_moment_is_gone_after_an_error(before: str, x: Tensor, request: pytest.FixtureRequest) -> None:
    module: nn.Module = request.getfixturevalue(before)
    expected, layer, classes = module(x), module.get_submodule("linear"), [type(each) for each in module.modules()]
    with pytest.raises(ZeroDivisionError), weight_from(layer, TensorSource(torch.ones(5, 8))):
        assert not torch.equal(module(x), expected)
        assert torch.equal(weight_of("", layer), torch.ones(5, 8))
        raise ZeroDivisionError
    assert torch.equal(module(x), expected)
    assert [type(each) for each in module.modules()] == classes


def test_another_parameter_in_its_place_is_the_weight(sourced: nn.Module, x: Tensor) -> None:
    zeros = {"linear.weight": torch.zeros(5, 8)}
    assert not functional_call(sourced, zeros, (x,)).any()
    assert sourced(x).any()
    sourced.get_submodule("linear").weight = nn.Parameter(torch.zeros(5, 8))
    assert not sourced(x).any()


def test_copies_share_the_source(sourced: nn.Module, plain: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(sourced)
    assert torch.equal(twin(x), plain(x))
    assert twin.get_submodule("conv").source is sourced.get_submodule("conv").source
    assert twin.get_parameter("norm.weight") is not sourced.get_parameter("norm.weight")
    assert dict(twin.named_parameters())["conv.weight"].untyped_storage().nbytes() == 4


def test_a_decompressed_weight_computes_like_one_that_was_loaded() -> None:
    """Strides of dimensions of one element are part of what PyTorch decides by."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 1).requires_grad_(False)
    form = parse_format("int8-row")
    source = CompressedSource(form.compress(layer.weight, ABSMAX))
    assert source.dense().stride() == layer.weight.stride()
    set_source(layer, source)
    loaded = nn.Conv2d(16, 8, 1).requires_grad_(False)
    loaded.bias = layer.bias
    loaded.weight.copy_(source.dense())
    x = torch.randn(2, 16, 12, 12)
    assert torch.equal(layer(x), loaded(x))
    assert layer(x).stride() == loaded(x).stride()


def test_another_layer_of_its_type_is_a_plain_one(sourced: nn.Module) -> None:
    made = type(sourced.get_submodule("linear"))(3, 2)
    assert type(made) is nn.Linear
    assert made.weight.shape == (2, 3)


def test_without_weights_there_are_shapes(sourced: nn.Module, plain: nn.Module, x: Tensor) -> None:
    twin = without_weights(sourced)
    assert [type(each) for each in twin.modules()] == [type(each) for each in plain.modules()]
    assert twin(x).isnan().all()
    assert twin.get_parameter("norm.weight") is sourced.get_parameter("norm.weight")
    assert torch.equal(sourced(x), plain(x))
    same = without_weights(plain)  # layers without a source keep what they have
    assert torch.equal(same(x), plain(x))


@pytest.mark.parametrize(
    "change", [materialise, lambda module: module.to("cpu"), lambda module: module.double().float()]
)
def test_materialised_layers_are_plain_and_their_own(
    change: object, sourced: nn.Module, plain: nn.Module, x: Tensor
) -> None:
    assert callable(change)
    twin = copy.deepcopy(sourced)
    change(twin)
    assert [type(each) for each in twin.modules()] == [type(each) for each in plain.modules()]
    assert torch.equal(twin(x), plain(x))
    with torch.no_grad():
        twin.get_parameter("linear.weight").zero_()
    assert torch.equal(sourced(x), plain(x))


def test_only_a_linear_or_a_conv2d_has_a_weight() -> None:
    for asked in (weight_of, weight_shape):
        with pytest.raises(TurbopocketError, match=r"unet\.norm: GroupNorm is not a Linear or a Conv2d with groups=1"):
            asked("unet.norm", nn.GroupNorm(2, 8))
