# SPDX-License-Identifier: Apache-2.0
"""Measured losses against what compressing really does to a model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import ABSMAX, GPTQ, MSE
from turbopocket.quant.formats import LayerFormat, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.plan import LayerChoices, plan
from turbopocket.quant.sensitivity import (
    estimate_from_shapes,
    hessian_loss,
    load_choices,
    measure,
    save_choices,
)

FORMATS = [parse_format(name) for name in ("fp32", "int8-row", "int4-g4", "int4-row")]
RUNNING = ("unet.conv_in", "unet.down", "unet.to_out")


def shapes_of(layers: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}


def candidates(layers: dict[str, nn.Module]) -> dict[str, list[LayerFormat]]:
    return {name: [each for each in FORMATS if each.fits(shape) is None] for name, shape in shapes_of(layers).items()}


@pytest.fixture
def layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in compressible_layers("unet", denoiser).items() if name in RUNNING}


@pytest.fixture
def outputs(denoiser: nn.Module, latents: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [denoiser(latents)]


@pytest.fixture
def choices(
    denoiser: nn.Module, layers: dict[str, nn.Module], outputs: Callable[[], list[Tensor]]
) -> dict[str, LayerChoices]:
    stats = calibrate({"unet": denoiser}, outputs)
    return measure(layers, stats, candidates(layers), outputs, MSE)


def loss_of(choices: LayerChoices, name: str) -> float:
    return next(candidate.loss for candidate in choices.candidates if candidate.scheme == name)


def test_predicted_loss_of_the_perturbed_format_is_the_error_of_the_model(
    denoiser: nn.Module,
    layers: dict[str, nn.Module],
    outputs: Callable[[], list[Tensor]],
    choices: dict[str, LayerChoices],
) -> None:
    reference = outputs()[0].detach()
    for name, layer in layers.items():
        alone = plan([choices[name]], None, 0, {name: "int4-row"})
        stats = calibrate({"unet": denoiser}, outputs)
        with decompressed({"unet": denoiser}, compress({name: layer}, alone, MSE, stats)):
            error = float((outputs()[0].detach() - reference).square().sum() / reference.square().sum())
        assert alone.predicted_loss == pytest.approx(error, rel=1e-3)


def test_fewer_bits_lose_more_and_fp32_loses_nothing(choices: dict[str, LayerChoices]) -> None:
    for each in choices.values():
        assert 0.0 == loss_of(each, "fp32") < loss_of(each, "int8-row") < loss_of(each, "int4-row")


def test_planted_sensitive_layer_is_found(
    denoiser: nn.Module, layers: dict[str, nn.Module], outputs: Callable[[], list[Tensor]]
) -> None:
    # One huge weight makes the other weights of its rows vanish in int4-row: here it hurts most.
    with torch.no_grad():
        layers["unet.down"].get_parameter("weight")[:, 0, 0, 0] = 40.0
        denoiser.get_parameter("conv_in.weight")[0] *= 1e-3
    stats = calibrate({"unet": denoiser}, outputs)
    choices = measure(layers, stats, candidates(layers), outputs, ABSMAX)
    losses = {name: loss_of(each, "int4-row") for name, each in choices.items()}
    assert max(losses, key=losses.__getitem__) == "unet.down"
    # A grouped format walls the huge weight in.
    assert loss_of(choices["unet.down"], "int4-g4") < 0.5 * losses["unet.down"]


def test_weights_and_outputs_are_as_before_after_measuring(
    denoiser: nn.Module, layers: dict[str, nn.Module], outputs: Callable[[], list[Tensor]]
) -> None:
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    stats = calibrate({"unet": denoiser}, outputs)
    measure(layers, stats, candidates(layers), outputs, GPTQ)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_hessian_loss_is_the_mean_squared_change_of_the_output() -> None:
    x_NK, error_OK = torch.randn(400, 6), torch.randn(3, 6)
    expected = float((x_NK @ error_OK.T).square().sum(1).mean())
    assert hessian_loss(error_OK, x_NK.T @ x_NK / 400) == pytest.approx(expected, rel=1e-5)


def test_layer_without_statistics_is_named(layers: dict[str, nn.Module], outputs: Callable[[], list[Tensor]]) -> None:
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: no statistics, the layer did not run"):
        measure(layers, {}, candidates(layers), outputs, MSE)


def test_candidate_that_does_not_fit_is_refused_with_the_layers_name(
    denoiser: nn.Module, layers: dict[str, nn.Module], outputs: Callable[[], list[Tensor]]
) -> None:
    stats = calibrate({"unet": denoiser}, outputs)
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: 4 input channels are not a multiple of group 8"):
        measure(layers, stats, {"unet.conv_in": [parse_format("int4-g8")]}, outputs, MSE)


def test_model_that_returns_zeros_is_refused(layers: dict[str, nn.Module], denoiser: nn.Module) -> None:
    stats = calibrate({"unet": denoiser}, lambda: denoiser(torch.ones(1, 4, 8, 8)))
    with pytest.raises(TurbopocketError, match=r"output 0 of the uncompressed model has energy 0"):
        measure(layers, stats, candidates(layers), lambda: [torch.zeros(3)], MSE)


def test_estimate_charges_more_bits_with_less_loss() -> None:
    formats: list[LayerFormat] = [parse_format(name) for name in ("fp16", "int8-row", "int4-g32", "int4-row")]
    estimate = estimate_from_shapes({"unet.a": (64, 64, 3, 3)}, {"unet.a": formats})["unet.a"]
    assert [candidate.nbytes for candidate in estimate.candidates] == [each.nbytes((64, 64, 3, 3)) for each in formats]
    losses = [candidate.loss for candidate in estimate.candidates]
    assert losses == sorted(losses)


def test_saved_choices_load_as_the_same(choices: dict[str, LayerChoices], tmp_path: Path) -> None:
    save_choices(tmp_path / "choices.json", choices)
    assert load_choices(tmp_path / "choices.json") == choices


def test_choices_of_schema_1_have_their_formats_for_schemes(choices: dict[str, LayerChoices], tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    save_choices(file, choices)
    file.write_text(
        file.read_text().replace('"scheme":', '"format":').replace('"schema_version": 2', '"schema_version": 1')
    )
    assert '"format":' in file.read_text()
    assert load_choices(file) == choices


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"schema_version": 9}), '{"schema_version": 2}'])
def test_file_that_holds_no_choices_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(TurbopocketError, match=r"choices\.json: not a file of choices"):
        load_choices(path)
