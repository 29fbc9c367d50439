# SPDX-License-Identifier: Apache-2.0
"""Weights stay in the files of a checkpoint: in their type, to the bit, and out of memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of, layers_of
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.account import layer_snr_db
from turbopocket.quant.compress import compress
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import TensorSource
from turbopocket.quant.plan import Choice, Plan

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def stored_as(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    copied = Path(shutil.copytree(folder, to))
    for file in copied.rglob("*.safetensors"):
        save_file({name: each.to(dtype) for name, each in load_file(file).items()}, file, {"format": "pt"})
    return copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_the_files_in_fp32_and_stay_in_its_type(tiny_sdxl: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = stored_as(tiny_sdxl, tmp_path / "model", dtype)
    unet = load(str(folder)).modules["unet"]
    expected = {name: each.float() for name, each in load_file(folder / UNET_FILE).items()}
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    sources = [layer.source for layer in unet.modules() if hasattr(layer, "source")]
    mapped = dtype != torch.float64
    assert len(sources) == (sum(isinstance(each, nn.Linear | nn.Conv2d) for each in unet.modules()) if mapped else 0)
    assert all(isinstance(each, TensorSource) and each.values.dtype == dtype for each in sources)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_mapped_values_are_checked_too(tiny_sdxl: Path, tmp_path: Path, bad: float) -> None:
    folder = stored_as(tiny_sdxl, tmp_path / "model", torch.float16)
    tensors = load_file(folder / UNET_FILE)
    tensors["conv_in.weight"][0, 0, 0, 0] = bad
    save_file(tensors, folder / UNET_FILE)
    with pytest.raises(TurbopocketError, match=r"conv_in\.weight has 1 of \d+ values that are NaN or infinite"):
        load(str(folder))


def test_the_snr_of_a_layer_is_that_of_its_outputs(tiny_sdxl: Path) -> None:
    """Beside the outputs themselves, with the stored weight and without, biases aside."""
    components = [each for each in components_of(load(str(tiny_sdxl))) if each.name == "vae_decoder"]
    layers = layers_of(components)
    formats = dict.fromkeys(layers, "int4-row") | {"vae_decoder.decoder.conv_out": "fp32"}
    shapes = {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}
    choices = [Choice(n, shapes[n], f, parse_format(f).nbytes(shapes[n]), 0.0) for n, f in formats.items()]
    weights = compress(layers, Plan(tuple(choices), 0, None), ABSMAX)
    latents = torch.randn(2, *components[0].example_inputs["latent_sample"].shape[1:])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].double(), y.double())}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        found = layer_snr_db(layers, weights, lambda: components[0].module(latents))
    for hook in hooks:
        hook.remove()
    assert found.keys() == layers.keys() == seen.keys()
    assert found.pop("vae_decoder.decoder.conv_out") is None
    for name, snr_db in found.items():
        layer, (x, y) = layers[name], seen[name]
        stored = weights[name].format.decompress(weights[name]).double()
        bias = layer.get_parameter("bias").double()
        if isinstance(layer, nn.Conv2d):
            changed = torch.nn.functional.conv2d(x, stored, bias, layer.stride, layer.padding)
            y_without = y - bias[:, None, None]
        else:
            changed, y_without = torch.nn.functional.linear(x, stored, bias), y - bias
        assert snr_db == pytest.approx(
            float(10 * torch.log10(y_without.square().sum() / (changed - y).square().sum())), abs=0.01
        )


def test_no_stage_holds_the_weights_in_fp32(tiny_sdxl: Path, wide_sdxl: Path) -> None:
    """The whole of load, trace, a run of each graph and one with stored weights, which are in memory: an eighth."""
    meter = Path(__file__).with_name("weights_meter.py")
    ran = subprocess.run(
        [sys.executable, str(meter), str(tiny_sdxl), str(wide_sdxl)],
        # What is freed goes back at once, so that what is measured is what is held.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["dense"] > 300e6
    assert found["growth"] < 0.5 * found["dense"], found


@pytest.fixture
def wide_sdxl(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """The same with an fp16 UNet of wide layers: memory is weights, not activations."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "wide"))
    shutil.rmtree(folder / "unet")
    config = json.loads((tiny_sdxl / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [width * 8 for width in config["block_out_channels"]]}
    UNet2DConditionModel.from_config(config).half().save_pretrained(folder / "unet")
    return folder
