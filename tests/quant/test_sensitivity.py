# SPDX-License-Identifier: Apache-2.0
"""Losses measured by random projections against what compressing really does to a model."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import row_losses
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import ABSMAX, MSE, Fit
from turbopocket.quant.formats import LayerFormat, parse_format
from turbopocket.quant.layer_rounding import roundings_of
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import LayerStats
from turbopocket.quant.plan import LayerChoices, plan
from turbopocket.quant.row_losses import Question, RowwiseOutput, measure
from turbopocket.quant.scheme import parse_scheme
from turbopocket.quant.sensitivity import (
    compress_candidates,
    estimate_from_shapes,
    hessian_loss,
    load_choices,
    save_choices,
)

FORMATS = [parse_format(name) for name in ("fp32", "int8-row", "int4-g4", "int4-row")]
RUNNING = ("unet.conv_in", "unet.down", "unet.to_out")
MANY = 1500
"""Vectors after which the estimate of three rows is within some percent."""


def shapes_of(layers: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}


def candidates(layers: dict[str, nn.Module]) -> dict[str, list[LayerFormat]]:
    return {name: [each for each in FORMATS if each.fits(shape) is None] for name, shape in shapes_of(layers).items()}


@pytest.fixture
def layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in compressible_layers("unet", denoiser).items() if name in RUNNING}


@pytest.fixture
def output(denoiser: nn.Module, latents: Tensor) -> RowwiseOutput:
    return RowwiseOutput(len(latents), lambda rows: denoiser(latents[rows]))


@pytest.fixture
def stats(denoiser: nn.Module, latents: Tensor) -> dict[str, LayerStats]:
    return calibrate({"unet": denoiser}, lambda: denoiser(latents))


def measured(
    layers: dict[str, nn.Module],
    stats: dict[str, LayerStats],
    output: RowwiseOutput,
    fit: Fit = MSE,
    **asked: Any,
) -> dict[str, LayerChoices]:
    formats = candidates(layers)
    stored = dict(compress_candidates(layers, stats, formats, fit))
    [choices] = measure([Question(layers, formats, stored, output, **asked)])
    return choices


@pytest.fixture
def choices(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput
) -> dict[str, LayerChoices]:
    return measured(layers, stats, output)


def loss_of(choices: LayerChoices, name: str) -> float:
    return next(candidate.loss for candidate in choices.candidates if candidate.scheme == name)


def real_loss(denoiser: nn.Module, latents: Tensor, layer: nn.Module, choices: LayerChoices, text: str) -> float:
    """||y - y0||² / ||y0||² with this layer alone in that format."""
    with torch.no_grad():
        reference = denoiser(latents)
        alone = plan([choices], None, 0, {choices.layer: text})
        stats = calibrate({"unet": denoiser}, lambda: denoiser(latents))
        with decompressed({"unet": denoiser}, compress({choices.layer: layer}, alone, MSE, stats)):
            return float((denoiser(latents) - reference).square().sum() / reference.square().sum())


def test_predicted_loss_of_each_candidate_is_the_error_it_makes(
    denoiser: nn.Module,
    latents: Tensor,
    layers: dict[str, nn.Module],
    stats: dict[str, LayerStats],
    output: RowwiseOutput,
) -> None:
    with torch.no_grad():
        latents *= torch.tensor([0.3, 1.0, 3.0]).reshape(3, 1, 1, 1)  # rows that are taken for each other are seen
    choices = measured(layers, stats, output, vectors=MANY)
    for name, layer in layers.items():
        for candidate in choices[name].candidates:
            error = real_loss(denoiser, latents, layer, choices[name], candidate.scheme)
            assert candidate.loss == pytest.approx(error, rel=0.12), (name, candidate.scheme)


def test_fp32_loses_nothing(layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput) -> None:
    for each in measured(layers, stats, output).values():
        assert 0.0 == loss_of(each, "fp32") < loss_of(each, "int8-row") < loss_of(each, "int4-row")


def test_rows_are_samples_of_their_own(layers: dict[str, nn.Module], denoiser: nn.Module) -> None:
    # 64 equal rows with one vector each are 64 samples: within 40 % of the truth, where one sample is anything.
    latents = torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1)
    stats = calibrate({"unet": denoiser}, lambda: denoiser(latents))
    choices = measured(layers, stats, RowwiseOutput(64, lambda rows: denoiser(latents[rows])), vectors=1)
    for name, layer in layers.items():
        error = real_loss(denoiser, latents, layer, choices[name], "int4-row")
        assert loss_of(choices[name], "int4-row") == pytest.approx(error, rel=0.5)


def test_losses_do_not_depend_on_how_rows_are_grouped(
    layers: dict[str, nn.Module],
    stats: dict[str, LayerStats],
    output: RowwiseOutput,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[slice] = []

    def run(rows: slice) -> Tensor:
        asked.append(rows)
        return output.run(rows)

    together = measured(layers, stats, RowwiseOutput(3, run))
    assert asked == [slice(0, 1), slice(0, 3)]  # the first tells what a row takes
    monkeypatch.setattr(row_losses, "KEPT_BYTES", 1)
    alone = measured(layers, stats, RowwiseOutput(3, run))
    assert asked[3:] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    for name, choices in alone.items():
        for one, other in zip(choices.candidates, together[name].candidates, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_same_seed_same_losses(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput
) -> None:
    assert measured(layers, stats, output, seed=1) == measured(layers, stats, output, seed=1)
    assert measured(layers, stats, output, seed=1) != measured(layers, stats, output, seed=2)


def test_layer_that_runs_twice_is_felt_in_both_calls() -> None:
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight += 2 * torch.eye(6)  # what the error makes of one call adds to what it makes of the other
    layers: dict[str, nn.Module] = {"unet.twice": layer}
    x = torch.randn(3, 6)

    def run(rows: slice) -> Tensor:
        y: Tensor = layer(layer(x[rows]))
        return y

    stats = calibrate({"unet": nn.ModuleDict({"twice": layer})}, lambda: run(slice(0, 3)))
    formats = {"unet.twice": [parse_format("int4-row"), parse_format("int8-row")]}
    stored = dict(compress_candidates(layers, stats, formats, MSE))
    [choices] = measure([Question(layers, formats, stored, RowwiseOutput(3, run), vectors=4000)])
    found = choices["unet.twice"]
    with torch.no_grad():
        change = formats["unet.twice"][1].decompress(stored["unet.twice"][1]) - layer.weight
        changed = layer(x) @ change.T + x @ change.T @ layer.weight.T
        expected = float(changed.square().sum() / run(slice(0, 3)).square().sum())
    assert loss_of(found, "int8-row") == pytest.approx(expected, rel=0.1)


def test_layer_with_one_candidate_is_neither_fitted_nor_measured(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput
) -> None:
    tried: list[str] = []

    def spread(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        for job in jobs:
            tried.append(job.name)
            yield work(job)

    formats = candidates(layers) | {"unet.down": [parse_format("int8-row")]}
    stored = dict(compress_candidates(layers, stats, formats, MSE, spread))
    assert tried == list(stored) == ["unet.conv_in", "unet.to_out"]
    [choices] = measure([Question(layers, formats, stored, output)])
    assert loss_of(choices["unet.down"], "int8-row") == 0.0 < loss_of(choices["unet.to_out"], "int8-row")


def test_nothing_runs_where_no_layer_has_a_choice(layers: dict[str, nn.Module]) -> None:
    def run(rows: slice) -> Tensor:
        raise AssertionError

    formats = {name: [parse_format("fp16")] for name in layers}
    [choices] = measure([Question(layers, formats, {}, RowwiseOutput(3, run))])
    assert [each.candidates[0].loss for each in choices.values()] == [0.0, 0.0, 0.0]


def test_planted_sensitive_layer_is_found(
    denoiser: nn.Module, latents: Tensor, layers: dict[str, nn.Module], output: RowwiseOutput
) -> None:
    # One huge weight makes the other weights of its rows vanish in int4-row: here it hurts most.
    with torch.no_grad():
        layers["unet.down"].get_parameter("weight")[:, 0, 0, 0] = 40.0
        denoiser.get_parameter("conv_in.weight")[0] *= 1e-3
    stats = calibrate({"unet": denoiser}, lambda: denoiser(latents))
    choices = measured(layers, stats, output, ABSMAX)
    losses = {name: loss_of(each, "int4-row") for name, each in choices.items()}
    assert max(losses, key=losses.__getitem__) == "unet.down"
    # A grouped format walls the huge weight in.
    assert loss_of(choices["unet.down"], "int4-g4") < 0.5 * losses["unet.down"]


def test_model_is_as_before_after_measuring(
    denoiser: nn.Module, layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput
) -> None:
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    measured(layers, stats, output)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in denoiser.modules())


def test_hessian_loss_is_the_mean_squared_change_of_the_output() -> None:
    x_NK, error_OK = torch.randn(400, 6), torch.randn(3, 6)
    expected = float((x_NK @ error_OK.T).square().sum(1).mean())
    assert hessian_loss(error_OK, x_NK.T @ x_NK / 400) == pytest.approx(expected, rel=1e-5)


def test_layer_without_statistics_is_named(layers: dict[str, nn.Module]) -> None:
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: no statistics, the layer did not run"):
        dict(compress_candidates(layers, {}, candidates(layers), MSE))


def test_candidate_that_does_not_fit_is_refused_with_the_layers_name(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats]
) -> None:
    formats = {"unet.conv_in": [parse_format("int4-g8"), parse_format("fp16")]}
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: 4 input channels are not a multiple of group 8"):
        dict(compress_candidates(layers, stats, formats, MSE))


def test_model_that_returns_zeros_is_refused(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput
) -> None:
    with pytest.raises(TurbopocketError, match=r"output of the uncompressed model has energy 0"):
        measured(layers, stats, RowwiseOutput(3, lambda rows: 0 * output.run(rows)))


def test_estimate_charges_more_bits_with_less_loss() -> None:
    formats: list[LayerFormat] = [parse_format(name) for name in ("fp16", "int8-row", "int4-g32", "int4-row")]
    estimate = estimate_from_shapes({"unet.a": (64, 64, 3, 3)}, {"unet.a": formats})["unet.a"]
    assert [candidate.nbytes for candidate in estimate.candidates] == [each.nbytes((64, 64, 3, 3)) for each in formats]
    losses = [candidate.loss for candidate in estimate.candidates]
    assert losses == sorted(losses)


def test_saved_choices_load_as_the_same(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], output: RowwiseOutput, tmp_path: Path
) -> None:
    choices = measured(layers, stats, output)
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


@pytest.mark.parametrize("name", ["a8-static", "a4-dynamic", "a6-static"])
def test_the_loss_of_a_rounding_is_the_error_it_makes(
    name: str, denoiser: nn.Module, latents: Tensor, layers: dict[str, nn.Module], stats: dict[str, LayerStats]
) -> None:
    schemes = {layer: [parse_scheme(f"int8-row+{name}")] for layer in layers}
    roundings = roundings_of(schemes, ranges_of(stats))
    formats = {layer: [each.weight for each in own] for layer, own in schemes.items()}
    output = RowwiseOutput(len(latents), lambda rows: denoiser(latents[rows]))
    [choices] = measure([Question(layers, formats, {}, output, roundings, MANY)])
    with torch.no_grad():
        expected = denoiser(latents)
        for layer, module in layers.items():
            [(own, rounding)] = roundings[layer].items()
            before = module.register_forward_pre_hook(lambda m, x, r=rounding: (r.of_input(m, x[0]), *x[1:]))
            after = module.register_forward_hook(lambda m, _, y, r=rounding: r.of_output(m, y))
            error = float((denoiser(latents) - expected).square().sum() / expected.square().sum())
            before.remove(), after.remove()
            assert own == name
            assert 0 < error == pytest.approx(choices[layer].roundings[name], rel=0.15)
            assert [each.loss for each in choices[layer].candidates] == [0.0]


def test_losses_are_shares_of_the_energy_that_is_given(
    layers: dict[str, nn.Module], stats: dict[str, LayerStats], denoiser: nn.Module, latents: Tensor
) -> None:
    def run(rows: slice) -> Tensor:
        return denoiser(latents[rows])

    own = measured(layers, stats, RowwiseOutput(len(latents), run))
    with torch.no_grad():
        energy = float(denoiser(latents).square().sum(dtype=torch.float64))
    given = measured(layers, stats, RowwiseOutput(len(latents), run, energy=2 * energy))
    for name, each in own.items():
        assert loss_of(given[name], "int4-row") == pytest.approx(loss_of(each, "int4-row") / 2, rel=1e-6)
