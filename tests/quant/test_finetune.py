# SPDX-License-Identifier: Apache-2.0
"""Training around frozen codes: what it must lower, what it must leave alone, and when it must give up."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.compress import decompressed
from turbopocket.quant.finetune import Calls, FineTuned, fine_tune, rounded_to_digits
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.options import FineTuneOptions

OPTIONS = FineTuneOptions(iterations=100, batch=32, learning_rate=1e-2)
FORMATS = {"unet.first": "avq2x3-d8", "unet.second": "int4-g32", "unet.third": "fp16"}


class Block(nn.Module):
    """Three layers and a norm, from a vector and a number to two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.first(x) + timestep.reshape(-1, 1)).tanh()
        return self.third(self.second(hidden).tanh()), hidden


class Wrapped(nn.Module):
    """As `ComponentModule`: the model behind the component's name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = Block()

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = self.unet(x, timestep)
        return outputs


@pytest.fixture
def module() -> Wrapped:
    return Wrapped()


def stored(module: Wrapped) -> dict[str, CompressedTensor]:
    layers = compressible_layers("unet", module.unet)
    return {name: parse_format(text).compress(layers[name].weight, MSE) for name, text in FORMATS.items()}


def recorded(module: nn.Module, seed: int, batches: int = 20) -> Calls:
    random = torch.Generator().manual_seed(seed)
    calls = []
    for index in range(batches):
        inputs = torch.randn(16, 64, generator=random), torch.tensor(index / batches)
        with torch.no_grad():
            calls.append((inputs, module(*inputs)))
    return Calls.of(calls)


def loss_with(module: Wrapped, weights: dict[str, CompressedTensor], calls: Calls) -> float:
    with torch.no_grad(), decompressed({"unet": module.unet}, weights):
        found = module(*calls.inputs)
    terms = [(a - b).square().mean() / b.square().mean() for a, b in zip(found, calls.outputs, strict=True)]
    return float(torch.stack(terms).mean())


def tuned(module: Wrapped, options: FineTuneOptions = OPTIONS) -> FineTuned:
    return fine_tune(module, stored(module), recorded(module, seed=1), options)


def test_outputs_on_calls_nobody_trained_on_come_closer(module: Wrapped) -> None:
    result, unseen = tuned(module), recorded(module, seed=2)
    before, after = loss_with(module, stored(module), unseen), loss_with(module, result.weights, unseen)
    assert after < 0.9 * before
    # What it says of itself holds for other calls of the same kind.
    assert result.before == pytest.approx(before, rel=0.2)
    assert result.after == pytest.approx(after, rel=0.2)


def test_codes_and_sizes_stay_and_everything_around_codes_moves(module: Wrapped) -> None:
    given, result = stored(module), tuned(module)
    assert list(result.weights)[:3] == list(given)
    for name, before in given.items():
        after = result.weights[name]
        after.require_promised_parts()
        moved = {part for part in before.parts if not torch.equal(before.parts[part], after.parts[part])}
        assert moved == {"unet.first": {"codebooks", "scale"}, "unet.second": {"scale"}, "unet.third": set()}[name]
    rest = {name: each for name, each in result.weights.items() if name not in given}
    assert set(rest) == {
        f"unet.{name}" for name in ("first.bias", "second.bias", "third.bias", "norm.weight", "norm.bias")
    }
    own = dict(module.named_parameters())
    assert all(not torch.equal(each.format.decompress(each), own[name]) for name, each in rest.items())


def test_module_keeps_its_own_parameters_and_a_second_run_gives_the_same(module: Wrapped) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = tuned(module), tuned(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for name, each in first.weights.items():
        assert all(torch.equal(part, second.weights[name].parts[key]) for key, part in each.parts.items())


def test_what_does_not_help_on_held_out_calls_is_not_kept(module: Wrapped) -> None:
    result = tuned(module, replace(OPTIONS, iterations=3, learning_rate=30.0))
    assert result.after > result.before
    given = stored(module)
    assert set(result.weights) == set(given)
    assert all(
        torch.equal(part, result.weights[name].parts[key])
        for name, each in given.items()
        for key, part in each.parts.items()
    )


def test_tuned_weights_can_be_tuned_again(module: Wrapped) -> None:
    once = tuned(module)
    again = fine_tune(module, once.weights, recorded(module, seed=1), OPTIONS)
    assert again.before == pytest.approx(once.after, rel=1e-3)
    worse = dict(once.weights)
    worse["unet.third.bias"] = parse_format("fp32").compress(torch.full((16,), 3.0), MSE)
    assert fine_tune(module, worse, recorded(module, seed=1), replace(OPTIONS, iterations=0)).before > 10 * again.before


def test_scales_of_groups_have_the_digits_that_the_runtime_keeps(module: Wrapped) -> None:
    result = fine_tune(module, stored(module), recorded(module, seed=1), OPTIONS, group_scale_digits=8)
    scale = result.weights["unet.second"].parts["scale"].float()
    assert torch.equal(scale, scale.bfloat16().float())
    finer = tuned(module).weights["unet.second"].parts["scale"].float()
    assert not torch.equal(finer, finer.bfloat16().float())


def test_rounding_to_digits_is_to_the_nearest() -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 257.0, 258.9, 3e-5])
    assert rounded_to_digits(values, 8).tolist() == pytest.approx([0.0, 1.0, -1.0, 256.0, 258.0, 3e-5], rel=4e-3)
    assert torch.equal(rounded_to_digits(values, 8), values.bfloat16().float())


def test_too_few_calls_and_a_loss_that_is_not_finite_are_refused(module: Wrapped) -> None:
    calls = recorded(module, seed=1)
    with pytest.raises(TurbopocketError, match="needs 2 calls or more, one of them held out, not 1"):
        fine_tune(module, stored(module), calls.some(torch.tensor([0])), OPTIONS)
    broken = Calls((calls.inputs[0] * torch.inf, calls.inputs[1]), calls.outputs)
    with pytest.raises(TurbopocketError, match="loss is nan in iteration 1") as raised:
        fine_tune(module, stored(module), broken, OPTIONS)
    assert raised.value.hint is not None


def test_codebooks_that_layers_share_are_trained_and_stay_equal(module: Wrapped) -> None:
    layers = compressible_layers("unet", module.unet)
    form = parse_format("avq2x8-d8-shared")
    before = {name: form.compress(layers[name].weight, MSE) for name in ("unet.first", "unet.second")}
    before["unet.third"] = parse_format("fp16").compress(layers["unet.third"].weight, MSE)
    result = fine_tune(module, before, recorded(module, seed=1), OPTIONS)
    assert result.after < 0.7 * result.before
    first, second = (result.weights[name].parts["codebooks"] for name in ("unet.first", "unet.second"))
    assert torch.equal(first, second)
    assert not torch.equal(first, before["unet.first"].parts["codebooks"])
    scales = [result.weights[name].parts["scale"] for name in ("unet.first", "unet.second")]
    assert not torch.equal(*scales)
