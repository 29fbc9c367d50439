# SPDX-License-Identifier: Apache-2.0
"""SDXL's published configs, without weights: what `load_shapes` says about them."""

import json
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from turbopocket.export.components import shapes_of
from turbopocket.export.families import LoadedModel, load, load_shapes
from turbopocket.quant.account import account
from turbopocket.quant.calibrate import compressible_layers
from turbopocket.quant.formats import parse_format
from turbopocket.quant.plan import plan, smallest_total_bytes
from turbopocket.quant.sensitivity import estimate_from_shapes, fitting
from turbopocket.runtimes.errors import TurbopocketError

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CLIP_SHARED = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "vocab_size": 49408,
}
CLIP_L = CLIP_SHARED | {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
OPENCLIP_BIG_G = CLIP_SHARED | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
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
TOKENIZER = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
FILES: dict[str, dict[str, Any]] = {
    "model_index.json": INDEX,
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": OPENCLIP_BIG_G,
    "unet/config.json": UNET,
    "vae/config.json": VAE,
    "scheduler/scheduler_config.json": SCHEDULER,
    "tokenizer/tokenizer_config.json": TOKENIZER,
    "tokenizer_2/tokenizer_config.json": TOKENIZER,
}


def _write_configs(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_configs(tmp_path_factory.mktemp("published") / "sdxl-base", FILES)


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
    choices = estimate_from_shapes(shapes, fitting(shapes, formats))
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
    assert (sdxl.name, sdxl.family, sdxl.folder) == ("sdxl-base", "sdxl", sdxl_configs)
    assert (sdxl.image_size_px, sdxl.vae_scale_factor) == (1024, 8)
    assert sdxl.scheduler_config["timestep_spacing"] == "leading"
    assert sdxl.pipeline_config["force_zeros_for_empty_prompt"] is True


def test_published_sd_1_unet_has_860_million_parameters(tmp_path: Path) -> None:
    files = FILES | {"model_index.json": SD_1_INDEX, "unet/config.json": SD_1_UNET}
    model = load_shapes(str(_write_configs(tmp_path, files)))
    assert round(sum(p.numel() for p in model.modules["unet"].parameters()) / 1e6) == 860
    assert (model.family, model.image_size_px, list(model.tokenizers)) == ("sd", 512, ["text_encoder"])


def test_a_folder_of_configs_alone_cannot_be_loaded_with_weights(sdxl_configs: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"text_encoder has no weights: no model\.safetensors"):
        load(str(sdxl_configs))
