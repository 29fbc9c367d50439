# SPDX-License-Identifier: Apache-2.0
"""Hessians against the outputs of real layers: what they predict is what PyTorch computes."""

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.formats import matrix_view
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import Extremes, SecondMoment

CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 5, 3, bias=False),
    "padded": nn.Conv2d(3, 5, 3, padding=1, bias=False),
    "strided": nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "dilated": nn.Conv2d(3, 5, 3, dilation=2, padding=2, bias=False),
    "same": nn.Conv2d(3, 5, (2, 3), padding="same", bias=False),
    "reflecting": nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", bias=False),
    "1x1": nn.Conv2d(3, 5, 1, bias=False),
}
LAYERS = CONVOLUTIONS | {"linear": nn.Linear(7, 5, bias=False)}


@pytest.mark.parametrize("chunk_floats", [2**23, 100], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("name", LAYERS)
# An even kernel with padding="same" makes PyTorch itself warn that it copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_hessian_reproduces_the_energy_of_the_layers_output(
    name: str, chunk_floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbopocket.quant.observe.vectors.CHUNK_FLOATS", chunk_floats)
    layer = LAYERS[name]
    x = torch.randn(2, 3, 9, 7)
    outputs: list[Tensor] = []

    def run() -> None:
        outputs.append(layer(x))
        outputs.append(layer(3 * x[:1]))

    stats = calibrate({"unet": layer}, run)["unet"]
    moment = stats[SecondMoment]
    weight_OK = matrix_view(layer.weight.detach())
    energy = sum(float(output.detach().double().square().sum()) for output in outputs)
    predicted = float(torch.trace(weight_OK @ moment.hessian_KK @ weight_OK.T)) * moment.count
    assert predicted == pytest.approx(energy, rel=1e-4)
    assert moment.count == sum(output.numel() // 5 for output in outputs)
    assert max(map(abs, stats[Extremes].output)) == max(float(output.detach().abs().max()) for output in outputs)


def test_hessian_is_the_mean_over_all_calls_not_the_last_one() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(50, 4)
    whole = calibrate({"unet": layer}, lambda: layer(x))["unet"][SecondMoment]
    parts = calibrate({"unet": layer}, lambda: [layer(part) for part in x.split(7)])["unet"][SecondMoment]
    assert torch.allclose(parts.hessian_KK, whole.hessian_KK, rtol=1e-6)
    assert parts.count == whole.count == 50


def test_layers_are_named_by_component_and_module_path(denoiser: nn.Module) -> None:
    # The convolution with groups is not a matrix product over all channels, so it is not there.
    assert list(compressible_layers("unet", denoiser)) == [
        "unet.conv_in",
        "unet.down",
        "unet.to_out",
        "unet.unused",
    ]


def test_embeddings_are_not_compressible_layers() -> None:
    assert compressible_layers("text_encoder", nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))) == {}


def test_layer_that_did_not_run_has_no_statistics(denoiser: nn.Module, latents: Tensor) -> None:
    stats = calibrate({"unet": denoiser}, lambda: denoiser(latents))
    assert set(stats) == {"unet.conv_in", "unet.down", "unet.to_out"}


def test_hooks_are_gone_afterwards_even_after_an_error(denoiser: nn.Module, latents: Tensor) -> None:
    latents[1, 2, 3, 4] = float("nan")
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: an input is NaN or infinite"):
        calibrate({"unet": denoiser}, lambda: denoiser(latents))
    assert not any(layer._forward_hooks for layer in denoiser.modules())


def test_layers_come_in_the_order_in_which_they_ran_and_only_those_asked_for() -> None:
    late_first = nn.ModuleDict({"late": nn.Linear(4, 4), "early": nn.Linear(4, 4)})

    def run() -> None:
        late_first["late"](late_first["early"](torch.randn(2, 4)))

    assert list(calibrate({"unet": late_first}, run)) == ["unet.early", "unet.late"]
    assert list(calibrate({"unet": late_first}, run, {"unet.late"})) == ["unet.late"]
