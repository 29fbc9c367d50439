# SPDX-License-Identifier: Apache-2.0
"""SDXL's published configs, without weights: what `load_shapes` says about them."""

import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from torch import nn

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import shapes_of
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.account import account
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.plan import plan, smallest_total_bytes
from turbopocket.quant.sensitivity import estimate_from_shapes

from ..published_sdxl import FILES, write_configs

SD_1_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SD_1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configs(tmp_path_factory.mktemp("published") / "sdxl-base")


@pytest.fixture(scope="module")
def sdxl(sdxl_configs: Path) -> LoadedModel:
    return load_shapes(str(sdxl_configs))


def _weight_shapes(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def test_published_unet_has_794_linear_and_conv_layers_with_2566_million_weights(sdxl: LoadedModel) -> None:
    layers = _weight_shapes(sdxl.modules["unet"])
    assert len(layers) == 794
    assert round(sum(layer.weight.numel() for layer in layers) / 1e6) == 2566


# What VQDM leaves in fp16, as `turbopocket plan --pin` would be told.
VQDM_PINS = dict.fromkeys(("unet.time_embedding.*", "unet.add_embedding.*", "*.time_emb_proj", "unet.conv_*"), "fp16")


@pytest.mark.parametrize(
    ("books", "bits", "megabytes", "bits_with_scales"),
    [(2, 2.156, 691, 2.165), (3, 3.156, 1012, 3.165), (4, 4.156, 1333, 4.165)],
)
def test_published_averages_of_vqdm_come_out_of_the_account(
    sdxl: LoadedModel, books: int, bits: float, megabytes: int, bits_with_scales: float
) -> None:
    """arXiv 2409.00492: 2.15, 3.15 and 4.15 bits, which leave the row scales out."""
    shapes = shapes_of(compressible_layers("unet", sdxl.modules["unet"]))
    formats = [parse_format(f"avq{books}x8-d8"), parse_format("fp16")]
    candidates = {name: [each for each in formats if each.fits(shape) is None] for name, shape in shapes.items()}
    choices = estimate_from_shapes(shapes, candidates)
    smallest = smallest_total_bytes(list(choices.values()), 0, VQDM_PINS)
    found = account(plan(list(choices.values()), smallest, 0, VQDM_PINS).choices)
    assert len(found.kept) == 23
    assert not [name for name in found.kept if not any(fnmatchcase(name, glob) for glob in VQDM_PINS)]
    assert round(found.average_bits(without=["scale"]), 3) == bits
    assert round(found.total_bytes(without=["scale"]) / 1e6) == megabytes
    assert found.total_bytes() == smallest
    assert round(found.average_bits(), 3) == bits_with_scales
    assert found.part_bytes["scale"] == 2 * sum(shape[0] for name, shape in shapes.items() if name not in found.kept)


@pytest.mark.parametrize(
    ("component", "millions"), [("text_encoder", 123), ("text_encoder_2", 695), ("unet", 2567), ("vae", 84)]
)
def test_published_components_have_their_known_sizes(sdxl: LoadedModel, component: str, millions: int) -> None:
    assert round(sum(p.numel() for p in sdxl.modules[component].parameters()) / 1e6) == millions


def test_shapes_of_sdxl_take_seconds_and_no_memory(sdxl_configs: Path) -> None:
    start = time.process_time()  # not wall time: another job on the machine must not fail this
    model = load_shapes(str(sdxl_configs))
    assert time.process_time() - start < 10
    tensors = [t for m in model.modules.values() for t in (*m.parameters(), *m.buffers())]
    assert all(tensor.is_meta for tensor in tensors)
    assert not model.has_weights


def test_shapes_carry_the_settings_of_the_pipeline(sdxl: LoadedModel, sdxl_configs: Path) -> None:
    assert (sdxl.name, sdxl.family.name, sdxl.folder) == ("sdxl-base", "sdxl", sdxl_configs)
    assert (sdxl.image_size, sdxl.vae_scale_factor) == ((1024, 1024), 8)
    assert sdxl.scheduler_config["timestep_spacing"] == "leading"
    assert sdxl.pipeline_config["force_zeros_for_empty_prompt"] is True


def test_published_sd_1_unet_has_860_million_parameters(tmp_path: Path) -> None:
    files = FILES | {"model_index.json": SD_1_INDEX, "unet/config.json": SD_1_UNET}
    model = load_shapes(str(write_configs(tmp_path, files)))
    assert round(sum(p.numel() for p in model.modules["unet"].parameters()) / 1e6) == 860
    assert (model.family.name, model.image_size, list(model.tokenizers)) == ("sd", (512, 512), ["text_encoder"])


def test_a_folder_of_configs_alone_cannot_be_loaded_with_weights(sdxl_configs: Path) -> None:
    with pytest.raises(
        TurbopocketError, match=r"tokenizer has neither tokenizer\.json nor vocab\.json and merges\.txt"
    ):
        load(str(sdxl_configs))
