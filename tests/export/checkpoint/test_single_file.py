# SPDX-License-Identifier: Apache-2.0
"""Single-file checkpoints in the original layout: the same modules as diffusers' own `from_single_file` gives."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.families.base import LoadedModel
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import load_manifest

from ..published_sdxl import FILES, write_configs
from .single_files import open_clip, original, write_single_file, write_sparse_file
from .test_families_shapes import SD_1_INDEX, SD_1_UNET

UNET = "model.diffusion_model."


def _same(found: LoadedModel, expected: Any) -> bool:
    """Whether every module's tensors are those of a model or of a diffusers pipeline, bit for bit."""
    for name, module in found.modules.items():
        other = expected.modules[name] if isinstance(expected, LoadedModel) else getattr(expected, name)
        theirs = other.state_dict()
        if module.state_dict().keys() != theirs.keys():
            return False
        if not all(torch.equal(tensor, theirs[key]) for key, tensor in module.state_dict().items()):
            return False
    return True


def _as_diffusers_loads(pipeline_class: str, file: Path, folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, pipeline_class).from_single_file(str(file), config=str(folder), local_files_only=True)


@pytest.mark.parametrize(("family", "name"), [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd")])
def test_modules_are_those_that_diffusers_loads_from_the_same_file(
    family: str, name: str, request: pytest.FixtureRequest
) -> None:
    file, folder = request.getfixturevalue(f"{name}_file"), request.getfixturevalue(f"tiny_{name}")
    ours = load(str(file), config=str(folder))
    assert _same(ours, _as_diffusers_loads(family, file, folder))
    assert _same(ours, load(str(folder)))
    assert (ours.name, ours.family.name, ours.has_weights) == (file.stem, name, True)


def test_open_clip_text_encoder_of_sd_2_is_the_one_that_diffusers_loads(
    sd_tensors: dict[str, Tensor], tiny_sd: Path, tmp_path: Path
) -> None:
    encoder = load(str(tiny_sd)).modules["text_encoder"]
    tensors = {name: tensor for name, tensor in sd_tensors.items() if not name.startswith("cond_stage_model.")}
    tensors |= open_clip(encoder, "cond_stage_model.model.") | {
        "cond_stage_model.model.text_projection": torch.ones(32, 32),
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.ones(32),  # published, and not used
    }
    file = write_single_file(tmp_path / "v2.safetensors", tensors)
    ours = load(str(file), config=str(tiny_sd))
    assert _same(ours, _as_diffusers_loads("StableDiffusionPipeline", file, tiny_sd))
    assert _same(ours, load(str(tiny_sd)))


def test_values_in_fp16_are_kept_exactly(sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path) -> None:
    halved = {name: tensor.half() for name, tensor in sdxl_tensors.items()}
    ours = load(str(write_single_file(tmp_path / "half.safetensors", halved)), config=str(tiny_sdxl))
    whole = load(str(tiny_sdxl))
    for name, module in ours.modules.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole.modules[name].state_dict()[key].half().float()), (name, key)
            assert tensor.is_contiguous()


def _without_text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}


def _with_extras(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What real files hold beside the model: schedules, averages, buffers of older libraries."""
    return {
        **tensors,
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.diffusion_modelinput_blocks00weight": torch.full((4,), float("nan")),
        "betas": torch.ones(1000),
        "sqrt_recipm1_alphas_cumprod": torch.ones(1000),
        "posterior_mean_coef2": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
    }


def _with_matrices_in_the_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor[:, :, 0, 0] if "mid.attn" in name and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("variant", [_without_text_model, _with_extras, _with_matrices_in_the_vae])
def test_variants_of_the_layout_give_the_same_model(
    variant: Callable[..., dict[str, Tensor]], sd_tensors: dict[str, Tensor], tiny_sd: Path, tmp_path: Path
) -> None:
    file = write_single_file(tmp_path / "m.safetensors", variant(sd_tensors))
    assert _same(load(str(file), config=str(tiny_sd)), load(str(tiny_sd)))


def test_extras_of_sdxl_files_give_the_same_model(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    extras = {
        "denoiser.sigmas": torch.ones(1000),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.text_projection.weight": torch.ones(2, 2),
        "conditioner.embedders.0.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    }
    file = write_single_file(tmp_path / "m.safetensors", sdxl_tensors | extras)
    assert _same(load(str(file), config=str(tiny_sdxl)), load(str(tiny_sdxl)))


# Parts of a model, completed from a folder that is whole.


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(UNET): tensor for name, tensor in tensors.items() if name.startswith(UNET)}


def _unet_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}


@pytest.mark.parametrize("layout", [_unet_only, _bare, "diffusers"])
def test_unet_in_a_file_of_its_own_takes_the_rest_from_a_folder_and_says_so(
    layout: Any, tiny_sdxl: Path, tmp_path: Path
) -> None:
    base = load(str(tiny_sdxl))
    unet: Any = base.modules["unet"]
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    tensors = unet.state_dict() if layout == "diffusers" else layout(original(base.modules))
    found = load(str(write_single_file(tmp_path / "turbo_unet.safetensors", tensors)), config=str(tiny_sdxl))
    assert _same(found, base)
    assert f"turbo_unet.safetensors has no text_encoder, text_encoder_2, vae: the weights are those of {tiny_sdxl}" in (
        found.notes
    )


def test_file_without_its_vae_takes_the_folders(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in sdxl_tensors.items() if not name.startswith("first_stage_model.")}
    found = load(str(write_single_file(tmp_path / "m.safetensors", tensors)), config=str(tiny_sdxl))
    assert _same(found, load(str(tiny_sdxl)))
    assert f"m.safetensors has no vae: the weights are those of {tiny_sdxl}" in found.notes


def test_unet_folder_is_completed_and_keeps_its_own_config(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd / "unet", tmp_path / "my_unet")
    config = json.loads((tmp_path / "my_unet/config.json").read_text())
    (tmp_path / "my_unet/config.json").write_text(json.dumps(config | {"sample_size": 24}))
    found = load(str(tmp_path / "my_unet"), config=str(tiny_sd))
    assert _same(found, load(str(tiny_sd)))
    assert (found.name, found.image_size) == ("my_unet", ImageSize(48, 48))
    assert load_shapes(str(tmp_path / "my_unet"), config=str(tiny_sd)).image_size == ImageSize(48, 48)


def test_biases_of_a_student_that_completes_a_file_are_not_the_files(
    sd_file: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny_sd, tmp_path / "student"))
    bias = load(str(sd_file), config=str(student)).modules["unet"].get_parameter("time_embedding.linear_2.bias")
    save_file({"2": torch.full_like(bias, 5.0)}, student / "unet/step_biases.safetensors")
    told = load(str(sd_file), steps=2, config=str(student)).modules["unet"]
    assert torch.equal(told.get_parameter("time_embedding.linear_2.bias"), bias)


# What a file says of sampling.


def _scheduler(file: Path, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    model = load_shapes(str(file), config=str(folder))
    return dict(model.scheduler_config), model.notes


def test_prediction_type_is_the_folders_and_said_to_be_assumed(sdxl_file: Path, tiny_sdxl: Path) -> None:
    config, notes = _scheduler(sdxl_file, tiny_sdxl)
    assert config == json.loads((tiny_sdxl / "scheduler/scheduler_config.json").read_text())
    assert (
        f"prediction_type epsilon is the scheduler's of {tiny_sdxl}: dream_xl.safetensors says nothing of it" in notes
    )


@pytest.mark.parametrize(
    ("markers", "metadata", "stated"),
    [
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.predict_key": "epsilon"}, {"prediction_type": "epsilon"}),
        (["v_pred"], {"modelspec.predict_key": "epsilon"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_what_a_file_states_of_its_noise_comes_before_the_folders_scheduler(
    markers: list[str],
    metadata: dict[str, str],
    stated: dict[str, Any],
    sdxl_tensors: dict[str, Tensor],
    tiny_sdxl: Path,
    tmp_path: Path,
) -> None:
    tensors = sdxl_tensors | {name: torch.zeros(0) for name in markers}
    unet = write_single_file(
        tmp_path / "unet.safetensors", _bare(tensors) | dict.fromkeys(markers, torch.zeros(0)), metadata
    )
    config, notes = _scheduler(unet, tiny_sdxl)
    assert {key: config[key] for key in stated} == stated
    config, notes = _scheduler(write_single_file(tmp_path / "noob.safetensors", tensors, metadata), tiny_sdxl)
    assert {key: config[key] for key in stated} == stated
    said = next(note for note in notes if "noob.safetensors says so" in note)
    assert all(f"{key} {value}" in said for key, value in stated.items())


# Files of real size: their headers, with holes for the values.

SD_2_FILES: dict[str, dict[str, Any]] = FILES | {
    "model_index.json": SD_1_INDEX,
    "unet/config.json": SD_1_UNET
    | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "text_encoder/config.json": FILES["text_encoder/config.json"]
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
}


def test_header_of_a_real_sdxl_file_is_mapped_without_reading_values(
    tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    configs = write_configs(tmp_path / "configs")
    tensors = original(load_shapes(str(configs)).modules)
    tensors |= {  # which the published file also has
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.empty(1, 77, device="meta"),
        "conditioner.embedders.1.model.logit_scale": torch.empty((), device="meta"),
    }
    file = write_sparse_file(tmp_path / "sd_xl_base_1.0.safetensors", tensors)
    # The published file has 2515 tensors and 6.94 GB; names and shapes of its deepest and most different blocks.
    assert len(tensors) == 2515
    assert round(file.stat().st_size / 1e9, 2) == 6.94
    assert {name: list(tensors[name].shape) for name in SDXL_SHAPES} == SDXL_SHAPES
    model = load_shapes(str(file), config=str(configs))
    assert round(sum(p.numel() for p in model.modules["unet"].parameters()) / 1e6) == 2567
    ran = turbopocket("plan", file, "--config", configs, "--budget", "2GB", "--json")
    planned = json.loads(ran.out)
    assert planned["total_bytes"] <= 2e9
    assert any("has no configs" in note for note in planned["notes"])


SDXL_SHAPES = {
    "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048],
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": [10240, 1280],
    "model.diffusion_model.middle_block.2.out_layers.3.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.5.1.transformer_blocks.1.attn1.to_out.0.weight": [640, 640],
    "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": [320, 640, 3, 3],
    "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
    "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
    "conditioner.embedders.1.model.text_projection": [1280, 1280],
    "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight": [512, 256, 1, 1],
    "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": [256, 512, 1, 1],
    "first_stage_model.decoder.mid.attn_1.q.weight": [512, 512, 1, 1],
}


@pytest.mark.parametrize("version", [1, 2])
def test_headers_of_real_sd_files_are_mapped(version: int, tmp_path: Path) -> None:
    sd_1 = FILES | {"model_index.json": SD_1_INDEX, "unet/config.json": SD_1_UNET}
    configs = write_configs(tmp_path / "configs", sd_1 if version == 1 else SD_2_FILES)
    modules = load_shapes(str(configs)).modules
    tensors = original(modules)
    if version == 2:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cond_stage_model.")}
        encoder = open_clip(modules["text_encoder"], "cond_stage_model.model.")
        last = {name.replace(".22.", ".23."): tensor for name, tensor in encoder.items() if ".22." in name}
        tensors |= encoder | last | {"cond_stage_model.model.text_projection": torch.empty(1024, 1024, device="meta")}
    file = write_sparse_file(tmp_path / "v.safetensors", tensors)
    model = load_shapes(str(file), config=str(configs))
    assert round(sum(p.numel() for p in model.modules["unet"].parameters()) / 1e6) == {1: 860, 2: 866}[version]


# From a file to a picture.


def test_artifact_of_a_file_is_the_folders_and_is_found_again_by_check(
    sdxl_file: Path, tiny_sdxl: Path, built: Any, tmp_path: Path, recipe_toml: Path, turbopocket: Callable[..., Any]
) -> None:
    asked = ("build", sdxl_file, "--config", tiny_sdxl, "--guidance", 5, "--recipe", recipe_toml)
    ran = turbopocket(*asked, "--out", tmp_path / "art")
    assert ran.code == 0, ran.err
    assert "note: dream_xl.safetensors has no configs, tokenizers and scheduler of its own" in ran.out
    ours, folders = load_manifest(tmp_path / "art"), load_manifest(built.folder)
    # graphs, and what they compute, may differ by a layer's format: the longer source leaves fewer bytes of the budget
    of_weights = "model.onnx", "self_check/"
    small, folders_small = (
        [file for file in each.files if not any(part in file.path for part in of_weights)] for each in (ours, folders)
    )
    assert small == folders_small
    assert ours.sampler == folders.sampler
    checked = turbopocket("check", tmp_path / "art")
    assert checked.code == 0, checked.err
    assert "parity was not measured" not in checked.out


def test_picture_of_a_file_is_the_folders(
    sd_file: Path, tiny_sd: Path, tmp_path: Path, recipe_toml: Path, turbopocket: Callable[..., Any]
) -> None:
    for name, source in (("file", (sd_file, "--config", tiny_sd)), ("folder", (tiny_sd,))):
        asked = ("build", *source, "--recipe", recipe_toml, "--formats", "fp32", "--budget", "8MB", "--steps", 1)
        assert turbopocket(*asked, "--out", tmp_path / name).code == 0
        assert turbopocket("generate", tmp_path / name, "a red circle", "-o", tmp_path / f"{name}.png").code == 0
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "folder.png").read_bytes()
    assert load_manifest(tmp_path / "file").files == load_manifest(tmp_path / "folder").files


def test_student_of_a_file_is_a_whole_folder(
    sd_file: Path, tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    configs = Path(shutil.copytree(tiny_sd, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")))
    short = ("--iterations", 1, "--set", "distill.batch=1", "--set", "distill.precision=no")
    ran = turbopocket("distill", sd_file, "--config", configs, *short, "--out", tmp_path / "student", "--json")
    assert ran.code == 0, ran.err
    assert any("dream.safetensors has no configs" in note for note in json.loads(ran.out)["notes"])
    student, teacher = load(str(tmp_path / "student")), load(str(tiny_sd))
    for name in ("text_encoder", "vae"):
        for key, tensor in student.modules[name].state_dict().items():
            assert torch.equal(tensor, teacher.modules[name].state_dict()[key].half().float()), key
