# SPDX-License-Identifier: Apache-2.0
"""A plan carried out, written, read back and put into the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import GPTQ, MSE
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import LayerStats
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.store import load_weights, save_weights

PLANNED = {
    "unet.conv_in": "int4-g4-asym",
    "unet.down": "int8-g8",
    "unet.to_out": "int4-row",
    "unet.unused": "fp16",
}


@pytest.fixture
def layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    return compressible_layers("unet", denoiser)


@pytest.fixture
def stats(denoiser: nn.Module, latents: Tensor) -> dict[str, LayerStats]:
    return calibrate({"unet": denoiser}, lambda: denoiser(latents))


@pytest.fixture
def plan(layers: dict[str, nn.Module]) -> Plan:
    shapes = {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}
    return Plan(
        tuple(
            Choice(name, shapes[name], each, parse_format(each).nbytes(shapes[name]), 0.0)
            for name, each in PLANNED.items()
        ),
        fixed_bytes=0,
        budget_bytes=None,
    )


@pytest.fixture
def weights(layers: dict[str, nn.Module], plan: Plan, stats: dict[str, LayerStats]) -> dict[str, CompressedTensor]:
    return compress(layers, plan, GPTQ, stats)


def test_every_layer_has_the_planned_format_and_bytes(weights: dict[str, CompressedTensor], plan: Plan) -> None:
    assert {name: str(stored.format) for name, stored in weights.items()} == PLANNED
    assert sum(stored.nbytes for stored in weights.values()) == plan.total_bytes


def test_same_model_and_plan_give_the_same_file(
    layers: dict[str, nn.Module], plan: Plan, stats: dict[str, LayerStats], tmp_path: Path
) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        save_weights(file, compress(layers, plan, GPTQ, stats))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_saved_weights_load_as_the_same(weights: dict[str, CompressedTensor], tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.safetensors", weights)
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert list(loaded) == list(weights)
    for name, stored in weights.items():
        assert (loaded[name].format, loaded[name].shape) == (stored.format, stored.shape)
        assert loaded[name].parts.keys() == stored.parts.keys()
        assert all(torch.equal(loaded[name].parts[part], stored.parts[part]) for part in stored.parts)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weight_that_is_not_finite_is_refused_with_the_layers_name(
    layers: dict[str, nn.Module], plan: Plan, stats: dict[str, LayerStats], bad: float
) -> None:
    with torch.no_grad():
        layers["unet.down"].get_parameter("weight")[3, 2, 1, 0] = bad
    with pytest.raises(TurbopocketError, match=r"unet\.down: 1 of 1,152 weights are NaN or infinite"):
        compress(layers, plan, MSE, stats)


def test_fit_without_its_statistics_names_the_layer(layers: dict[str, nn.Module], plan: Plan) -> None:
    with pytest.raises(TurbopocketError, match=r"unet\.conv_in: gptq needs the layer's Hessian") as refusal:
        compress(layers, plan, GPTQ)
    assert refusal.value.hint


def test_plan_of_another_model_is_refused(layers: dict[str, nn.Module], plan: Plan) -> None:
    shorter = Plan(plan.choices[:-1], 0, None)
    with pytest.raises(TurbopocketError, match=r"1 layers are not in the plan, the first is unet\.unused"):
        compress(layers, shorter, MSE)
    del layers["unet.down"]
    with pytest.raises(TurbopocketError, match=r"1 layers are in the plan, not in the model.*unet\.down"):
        compress(layers, plan, MSE)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("unet.conv_in", (8, 4), "fp16", 64, 0.0), r"shape \[8, 4, 3, 3\], planned for shape \[8, 4\]"),
        (Choice("unet.conv_in", (8, 4, 3, 3), "fp16", 9, 0.0), "576 bytes in fp16, the plan counts 9"),
        (Choice("unet.conv_in", (8, 4, 3, 3), "int4-g8", 9, 0.0), "4 input channels are not a multiple"),
        (Choice("unet.conv_in", (8, 4, 3, 3), "int3", 9, 0.0), "`int3` is not a weight format"),
    ],
    ids=["shape", "bytes", "fit", "format"],
)
def test_plan_that_does_not_match_the_layer_is_refused(
    layers: dict[str, nn.Module], choice: Choice, message: str
) -> None:
    with pytest.raises(TurbopocketError, match=rf"unet\.conv_in: .*{message}"):
        compress({"unet.conv_in": layers["unet.conv_in"]}, Plan((choice,), 0, None), MSE)


def test_model_has_the_stored_weights_inside_the_block_and_its_own_after_it(
    denoiser: nn.Module, weights: dict[str, CompressedTensor]
) -> None:
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    with decompressed({"unet": denoiser}, weights):
        for name, stored in weights.items():
            inside = denoiser.get_parameter(name.removeprefix("unet.") + ".weight")
            assert torch.equal(inside, stored.format.decompress(stored))
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_model_has_its_own_weights_again_after_an_error(
    denoiser: nn.Module, weights: dict[str, CompressedTensor]
) -> None:
    before = denoiser.get_parameter("down.weight").clone()
    with pytest.raises(KeyError), decompressed({"unet": denoiser}, weights):
        raise KeyError
    assert torch.equal(denoiser.get_parameter("down.weight"), before)


def test_stored_layer_the_model_lacks_is_refused(denoiser: nn.Module, weights: dict[str, CompressedTensor]) -> None:
    with (
        pytest.raises(TurbopocketError, match=r"4 stored layers are not in the model.*unet\.conv_in"),
        decompressed({"vae_decoder": denoiser}, weights),
    ):
        pass


def test_layer_of_another_shape_is_refused_and_the_others_are_restored(
    denoiser: nn.Module, weights: dict[str, CompressedTensor]
) -> None:
    before = denoiser.get_parameter("conv_in.weight").clone()
    weights["unet.unused"] = parse_format("fp16").compress(torch.zeros(2, 2), MSE)
    with (
        pytest.raises(TurbopocketError, match=r"unet\.unused: stored shape \[2, 2\], the model has \[4, 4\]"),
        decompressed({"unet": denoiser}, weights),
    ):
        pass
    assert torch.equal(denoiser.get_parameter("conv_in.weight"), before)


def test_file_that_holds_no_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(TurbopocketError, match=r"weights\.safetensors: not a file of compressed weights"):
        load_weights(path)


def test_file_whose_parts_are_wrong_names_file_and_layer(weights: dict[str, CompressedTensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    stored = weights["unet.to_out"]
    parts = stored.parts | {"scale": stored.parts["scale"].float()}
    save_weights(path, weights | {"unet.to_out": CompressedTensor(stored.format, stored.shape, parts)})
    with pytest.raises(TurbopocketError, match=r"weights\.safetensors: .*unet\.to_out: int4-row of shape"):
        load_weights(path)
