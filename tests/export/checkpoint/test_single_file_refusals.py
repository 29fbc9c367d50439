# SPDX-License-Identifier: Apache-2.0
"""Files that are no model, or only a part of one: one sentence each that names what it is and what is allowed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turbopocket.export.checkpoint import hub
from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.ground.errors import TurbopocketError

from .single_files import write_single_file

UNET = "model.diffusion_model."
SUPPORTED = "supported are checkpoints of Stable Diffusion 1.x, 2.x and XL"
ONE = torch.ones(1)


def _refused(file: Path, config: Path | str | None, *said: str) -> TurbopocketError:
    """Checks that the file is refused alike with and without weights; returns the error."""
    messages = []
    for read in (load, load_shapes):
        with pytest.raises(TurbopocketError) as caught:
            read(str(file), config=None if config is None else str(config))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for part in (str(file), *said):
        assert part in messages[0]
    assert not messages[0].endswith(".")
    return caught.value


OTHERS = {
    "a LoRA": ["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "lora_te1_x.alpha"],
    "a LoRA ": ["unet.down_blocks.1.attentions.0.to_q.lora_A.weight"],
    "a LoRA  ": ["lora_unet_mid_block_attentions_0_to_q.hada_w1_a"],
    "a ControlNet": ["control_model.time_embed.0.weight", f"{UNET}input_blocks.0.0.weight"],
    "a ControlNet ": ["controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.resnets.0.x"],
    "a T2I-Adapter": ["adapter.body.0.in_conv.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"],
    "a textual inversion": ["emb_params"],
    "a textual inversion ": ["clip_g", "clip_l"],
    "a VAE only": ["encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.bias"],
    "a VAE only ": ["first_stage_model.decoder.conv_in.weight", "first_stage_model.quant_conv.bias"],
    "a text encoder only": ["text_model.embeddings.token_embedding.weight", "text_projection.weight"],
    "a checkpoint without its UNet (text_encoder, vae)": [
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "first_stage_model.decoder.conv_in.weight",
    ],
    "a checkpoint of another architecture (flux": [
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"
    ],
    "no checkpoint of a diffusion model (model.layers.0.weight)": ["model.layers.0.weight"],
    "no checkpoint of a diffusion model ()": [],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_called_by_their_name(what: str, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", dict.fromkeys(OTHERS[what], ONE))
    error = _refused(file, None, f"is {what.strip()}", SUPPORTED)
    assert ("--lora" in (error.hint or "")) == ("LoRA" in what)


@pytest.mark.parametrize(
    ("channels", "what"),
    [(9, "an inpainting checkpoint"), (8, "an editing checkpoint"), (7, "an upscaler"), (5, "a depth")],
)
@pytest.mark.parametrize("name", [f"{UNET}input_blocks.0.0.weight", "conv_in.weight"])
def test_unet_with_more_channels_is_refused_with_what_they_are_for(
    channels: int, what: str, name: str, tmp_path: Path
) -> None:
    tensors = {name: torch.ones(32, channels, 3, 3), "down_blocks.0.x": ONE}
    _refused(write_single_file(tmp_path / "m.safetensors", tensors), None, what, f"takes {channels} channels", "take 4")


@pytest.mark.parametrize(
    "tensors",
    [
        {"conditioner.embedders.0.model.ln_final.bias": ONE},
        {f"{UNET}label_emb.0.0.weight": torch.ones(1536, 2560)},
    ],
)
def test_refiner_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    conv_in = {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 4, 3, 3)}
    file = write_single_file(tmp_path / "m.safetensors", conv_in | tensors)
    _refused(file, None, "is a Stable Diffusion XL refiner", SUPPORTED)


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_continuous_noise_levels_are_refused(
    name: str, sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    file = write_single_file(tmp_path / "m.safetensors", sdxl_tensors | {name: ONE})
    _refused(file, tiny_sdxl, "continuous noise levels", f"tensor {name}")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        ("model.safetensors", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        ("model.ckpt", b"PK\x03\x04", "is a pickle, which can run code when opened"),
        ("model.onnx", b"\x08\x07", "is a .onnx file"),
        ("model", b"\x08\x07", "is a nameless file"),
    ],
)
def test_other_formats_are_refused_with_the_allowed_one(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, None, what, "allowed is a checkpoint in .safetensors")


def test_file_that_is_not_there_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/dream.safetensors", "dream.safetensors", "models/dream.ckpt"):
        with pytest.raises(TurbopocketError, match=f"^{name} does not exist$"):
            load(name)


def run_python(hint: str, folder: Path) -> None:
    """Runs the `python -c "…"` command of a hint."""
    code = hint.split('python -c "', 1)[1].split('"', 1)[0]
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_command_for_a_pickle_makes_a_folder_that_loads(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    torch.save(sdxl_tensors, tmp_path / "dream.ckpt")
    error = _refused(tmp_path / "dream.ckpt", tiny_sdxl, "is a pickle")
    assert "StableDiffusionPipeline for SD 1.x" in (error.hint or "")
    run_python(error.hint or "", tmp_path)
    found, expected = load(str(tmp_path / "dream")).modules, load(str(tiny_sdxl)).modules
    for name, module in found.items():
        theirs = expected[name].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in module.state_dict().items())


# Tensors that fit nowhere.


def _changed(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    return kept if value is None else kept | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("something.else", ONE, "1 tensors are in no part that is known here: something.else"),
        ("model_emb.weight", ONE, "model_emb.weight"),
        ("cond_stage_model.transformer.text_model.embeddings.extra", ONE, "embeddings.extra"),
        (f"{UNET}adm_proj.weight", ONE, f"1 tensors are in no unet known here, {UNET}adm_proj.weight first"),
        (f"{UNET}input_blocks.1.0.in_layers.7.weight", ONE, "1 tensors are not in the model of config.json"),
        (f"{UNET}out.2.bias", None, "1 tensors are missing: conv_out.bias"),
        (f"{UNET}out.2.bias", torch.ones(5), f"{UNET}out.2.bias has shape [5], config.json asks for [4]"),
        (f"{UNET}out.2.bias", torch.ones(4).to(torch.float8_e4m3fn), f"{UNET}out.2.bias is F8_E4M3; allowed: F64"),
        (f"{UNET}input_blocks.9.0.in_layers.0.bias", ONE, "unet"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", torch.ones(32, 32, 3, 3), "a matrix is needed"),
        ("first_stage_model.decoder.mid.attn_1.q.bias", torch.ones(31), "q.bias has shape [31]"),
    ],
)
def test_tensor_that_fits_nowhere_is_refused_by_name(
    name: str, value: Tensor | None, said: str, sd_tensors: dict[str, Tensor], tiny_sd: Path, tmp_path: Path
) -> None:
    file = write_single_file(tmp_path / "m.safetensors", _changed(sd_tensors, name, value))
    _refused(file, tiny_sd, said)


def test_joined_projections_of_another_height_are_refused(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    file = write_single_file(tmp_path / "m.safetensors", _changed(sdxl_tensors, name, torch.ones(193, 64)))
    _refused(file, tiny_sdxl, f"{name} has shape [65, 64], config.json asks for [64, 64]")


def test_nan_is_refused_by_the_files_own_name(sd_tensors: dict[str, Tensor], tiny_sd: Path, tmp_path: Path) -> None:
    name = f"{UNET}time_embed.0.bias"
    bad = torch.full_like(sd_tensors[name], float("nan"))
    file = write_single_file(tmp_path / "m.safetensors", sd_tensors | {name: bad})
    with pytest.raises(TurbopocketError, match=f"m.safetensors: {name} has {len(bad)} of {len(bad)} values"):
        load(str(file), config=str(tiny_sd))


# What completes a file.


def _unet_file(tensors: dict[str, Tensor], folder: Path) -> Path:
    return write_single_file(folder / "unet.safetensors", {k: v for k, v in tensors.items() if k.startswith(UNET)})


def test_missing_parts_are_named_with_the_way_to_complete_them(sdxl_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = _unet_file(sdxl_tensors, tmp_path)
    error = _refused(file, None, "holds the UNet only: text_encoder, text_encoder_2, vae are missing")
    assert "--config" in (error.hint or "")
    without_vae = {name: tensor for name, tensor in sdxl_tensors.items() if not name.startswith("first_stage_model.")}
    _refused(write_single_file(file, without_vae), None, "is no whole model: vae is missing")


def test_missing_parts_are_named_when_the_folder_has_configs_only(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    without_weights = shutil.ignore_patterns("*.safetensors")
    configs = Path(shutil.copytree(tiny_sdxl, tmp_path / "configs", ignore=without_weights))
    file = _unet_file(sdxl_tensors, tmp_path)
    assert load_shapes(str(file), config=str(configs)).family.name == "sdxl"
    with pytest.raises(TurbopocketError, match="holds the UNet only.*, and .*text_encoder has no weights"):
        load(str(file), config=str(configs))


def test_file_that_does_not_fit_the_configs_is_refused_with_whose_they_are(
    sd_tensors: dict[str, Tensor], tiny_sd: Path, tmp_path: Path
) -> None:
    wider = _changed(sd_tensors, f"{UNET}out.0.bias", torch.ones(64))
    error = _refused(write_single_file(tmp_path / "m.safetensors", wider), tiny_sd, "has shape [64]")
    assert error.hint == f"the configs are those of {tiny_sd}: --config names those of a model of another shape"


def test_folder_of_another_family_is_refused(sdxl_file: Path, tiny_sd: Path) -> None:
    _refused(
        sdxl_file, tiny_sd, "is for a StableDiffusionXLPipeline", f"config {tiny_sd} is of a StableDiffusionPipeline"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("nothing here", "config: 'nothing here' is neither a bundled model"),
        ("v1-inference.yaml", "config: v1-inference.yaml is a file; a diffusers folder or a hub id is needed"),
        ("empty", "config: empty has no model_index.json"),
    ],
)
def test_config_that_is_no_folder_of_a_pipeline_is_refused(
    config: str, said: str, sdxl_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "v1-inference.yaml").write_text("model: {}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TurbopocketError) as caught:
        load(str(sdxl_file), config=config)
    assert said in str(caught.value)


def test_config_beside_a_folder_that_is_whole_is_refused(tiny_sd: Path, turbopocket: Callable[..., Any]) -> None:
    ran = turbopocket("plan", tiny_sd, "--config", tiny_sd)
    assert ran.code == 1
    assert "has configs of its own" in ran.err


class _Hub:
    """Stands in for the hub: a repository with these files, or none that answers."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.asked, self.fetched = folder, "", list[str]()

    def model_info(self, repo_id: str, timeout: float) -> Any:
        if self.folder is None:
            raise OSError("no network")
        self.asked = repo_id
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        return type("Info", (), {"siblings": [type("Sibling", (), {"rfilename": name}) for name in names]})

    def snapshot_download(self, repo_id: str, allow_patterns: list[str] | None = None, **_: Any) -> str:
        if self.folder is None:
            raise hub.LocalEntryNotFoundError("nothing in the cache")
        self.fetched = allow_patterns or []
        return str(self.folder)


def _stand_in(folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    stand_in = _Hub(folder)
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"), ("sd", "stable-diffusion-v1-5/stable-diffusion-v1-5")],
)
def test_without_a_config_only_the_configs_of_diffusers_choice_are_fetched(
    name: str, repo_id: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = request.getfixturevalue(f"{name}_file"), request.getfixturevalue(f"tiny_{name}")
    stand_in = _stand_in(folder, monkeypatch)
    model = load(str(file))
    assert stand_in.asked == repo_id
    assert {Path(each).suffix for each in stand_in.fetched} == {".json", ".txt"}
    assert any(repo_id in note and "--config names others" in note for note in model.notes)


def test_of_a_hub_id_only_the_weights_that_a_file_lacks_are_fetched(
    sdxl_tensors: dict[str, Tensor], tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _stand_in(tiny_sdxl, monkeypatch)
    load(str(_unet_file(sdxl_tensors, tmp_path)), config="owner/base")
    weights = sorted(each.split("/")[0] for each in stand_in.fetched if each.endswith(".safetensors"))
    assert weights == ["text_encoder", "text_encoder_2", "vae"]


def test_unreachable_configs_are_one_sentence_with_the_way_out(
    sdxl_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(None, monkeypatch)
    error = _refused(
        sdxl_file, None, "has no configs and tokenizers of its own", "stable-diffusion-xl-base-1.0", "OSError"
    )
    assert (error.hint or "").startswith("--config FOLDER: a diffusers folder of the same architecture")


def test_repository_of_single_files_is_refused_with_the_command_to_fetch_one(
    sdxl_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(sdxl_file.parent, monkeypatch)
    with pytest.raises(
        TurbopocketError, match="owner/dream has no model_index.json.*holds dream_xl.safetensors"
    ) as caught:
        load("owner/dream")
    assert caught.value.hint == (
        "hf download owner/dream dream_xl.safetensors --local-dir dream fetches what can be given"
    )
