# SPDX-License-Identifier: Apache-2.0
"""Folders that are no diffusers pipeline: what they hold is named, and the hint leads to a model that loads."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.ground.errors import TurbopocketError

from .single_files import write_single_file
from .test_single_file_refusals import run_python

ONE = torch.ones(1)


def _refused(folder: Path, *said: str, config: Path | None = None) -> str:
    """Checks that the folder is refused alike with and without weights; returns the hint."""
    messages = []
    for read in (load, load_shapes):
        with pytest.raises(TurbopocketError) as caught:
            read(str(folder), config=None if config is None else str(config))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for part in (str(folder), *said):
        assert part in messages[0]
    assert not messages[0].endswith(".")
    return caught.value.hint or ""


def test_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert _refused(tmp_path, "has no model_index.json", "it holds nothing") == ""


@pytest.mark.parametrize("below", [".", "one", "one/two"])
def test_pipeline_further_down_is_found(below: str, tiny_sd: Path, tmp_path: Path) -> None:
    inside = tmp_path / "models--owner--name" / below / "revision"
    shutil.copytree(tiny_sd, inside)
    hint = _refused(tmp_path / "models--owner--name", "revision, which has one")
    assert load(hint.removeprefix("give ")).family.name == "sd"


def test_unet_folder_is_named_with_what_is_missing_and_where_it_may_be(tiny_sdxl: Path, tmp_path: Path) -> None:
    said = "holds the UNet only: text_encoder, text_encoder_2, vae are missing"
    assert _refused(tiny_sdxl / "unet", said) == f"give the whole model: {tiny_sdxl}"
    shutil.copytree(tiny_sdxl / "unet", tmp_path / "unet")
    assert "--config FOLDER" in _refused(tmp_path / "unet", said)


def test_unet_folder_of_another_family_than_the_completing_folder_is_refused(tiny_sdxl: Path, tiny_sd: Path) -> None:
    _refused(tiny_sdxl / "unet", "is for a StableDiffusionXLPipeline", config=tiny_sd)


def test_unet_that_does_not_fit_the_completing_folder_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(tiny_sd / "unet", tmp_path / "unet"))
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 64}))
    with pytest.raises(TurbopocketError, match="the UNet takes text 64 wide, text_encoder give 32"):
        load(str(unet), config=str(tiny_sd))


@pytest.mark.parametrize(("part", "name"), [("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")])
def test_folder_of_another_component_is_named(part: str, name: str, tiny_sd: Path) -> None:
    assert _refused(tiny_sd / part, f"it holds a {name} only") == f"give the whole model: {tiny_sd}"


def test_folder_of_component_folders_leads_to_its_unet(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd / "unet", tmp_path / "checkpoint-500/unet")
    hint = _refused(tmp_path / "checkpoint-500", "it holds unet/ (UNet2DConditionModel)")
    unet = hint.removeprefix("give ").split(",")[0]
    assert load(unet, config=str(tiny_sd)).name == "unet"


def test_single_files_in_a_folder_are_named_and_the_checkpoint_is_pointed_to(
    sd_file: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    write_single_file(tmp_path / "a_style.safetensors", {"lora_unet_x.lora_down.weight": ONE})
    shutil.copy(sd_file, tmp_path / "dream.safetensors")
    (tmp_path / "z_cut.safetensors").write_bytes(sd_file.read_bytes()[:99])
    hint = _refused(
        tmp_path,
        "it holds a_style.safetensors (a LoRA), dream.safetensors (a Stable Diffusion 1.x checkpoint), "
        "z_cut.safetensors (broken)",
    )
    assert load(hint.removeprefix("give the file: "), config=str(tiny_sd)).name == "dream"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unet.onnx", "an ONNX export (unet.onnx)"),
        ("Unet.mlmodelc", "a Core ML export (Unet.mlmodelc)"),
        ("unet.pte", "an ExecuTorch export (unet.pte)"),
        ("model-Q4_K.gguf", "GGUF files, whose weights are compressed already (model-Q4_K.gguf)"),
        ("README.md", "it holds README.md"),
    ],
)
def test_other_contents_are_named(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    assert _refused(tmp_path, said)


def test_pickled_checkpoint_in_a_folder_is_named_with_the_command(tmp_path: Path) -> None:
    torch.save({"a": ONE}, tmp_path / "dream.ckpt")
    assert "from_single_file" in _refused(tmp_path, "only pickles (dream.ckpt), which can run code")


def test_artifact_is_named_with_what_it_was_made_from(built: Any, tiny_sdxl: Path) -> None:
    assert _refused(built.folder, "is an artifact that `build` made") == f"give what it was made from: {tiny_sdxl.name}"


# A pipeline whose component has weights under other names.


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def _no_weights(folder: Path, *said: str) -> str:
    with pytest.raises(TurbopocketError) as caught:
        load(str(folder))
    for part in said:
        assert part in str(caught.value)
    return caught.value.hint or ""


def test_weights_of_another_name_are_named_and_the_hint_renames_them(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/my tuned unet.safetensors")
    hint = _no_weights(folder, "unet has no weights", "it holds config.json, my tuned unet.safetensors")
    subprocess.run(shlex.split(hint), check=True)
    assert load(str(folder)).has_weights


def test_weights_of_several_other_names_are_named_without_a_guess(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "unet/ema.safetensors")
    file.rename(folder / "unet/raw.safetensors")
    assert _no_weights(folder, "it holds config.json, ema.safetensors, raw.safetensors") == ""


def test_variants_alone_are_used(folder: Path) -> None:
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / f"{part}/{stem}.safetensors").rename(folder / f"{part}/{stem}.fp16.safetensors")
    assert load(str(folder)).has_weights


@pytest.mark.parametrize(
    ("part", "stem", "pickle"),
    [
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model", "pytorch_model.bin"),
    ],
)
def test_command_for_a_pickled_component_makes_a_folder_that_loads(
    part: str, stem: str, pickle: str, folder: Path, tiny_sd: Path
) -> None:
    file = folder / part / f"{stem}.safetensors"
    torch.save(load_file(file), folder / part / pickle)
    file.unlink()
    run_python(_no_weights(folder, f"only as pickles ({pickle})"), folder.parent)
    found, expected = (load(str(path)).modules[part].state_dict() for path in (f"{folder}-safetensors", tiny_sd))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_command_for_a_pickled_unet_folder_makes_one_that_loads(tiny_sd: Path, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(tiny_sd / "unet", tmp_path / "unet"))
    torch.save(load_file(unet / "diffusion_pytorch_model.safetensors"), unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TurbopocketError, match="only as pickles") as caught:
        load(str(unet), config=str(tiny_sd))
    run_python(caught.value.hint or "", tmp_path)
    assert load(f"{unet}-safetensors", config=str(tiny_sd)).has_weights


def test_lone_shard_is_named(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file), folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    file.unlink()
    assert _no_weights(folder, "it holds config.json, diffusion_pytorch_model-00001-of-00002.safetensors") == ""
