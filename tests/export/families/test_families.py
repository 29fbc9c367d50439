# SPDX-License-Identifier: Apache-2.0
"""What `load` gives equals what diffusers gives, whatever the layout of the files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbopocket.export.checkpoint.header import read_header
from turbopocket.export.checkpoint.load import load, tokenizer_json
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.registry import FAMILIES
from turbopocket.export.families.tokenizers import CLIP

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def sd_copy(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "copy"))


def _diffusers_pipeline(folder: Path) -> Any:
    import diffusers

    class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True)


def _outputs(modules: Any, has_two_encoders: bool) -> dict[str, Tensor]:
    """Returns each module's output for the same fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 540, (1, 77), generator=generator)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        first = modules["text_encoder"](ids, output_hidden_states=True)
        text, conditions = first.last_hidden_state, None
        outputs = {"text_encoder": text}
        if has_two_encoders:
            second = modules["text_encoder_2"](ids, output_hidden_states=True)
            text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            conditions = {"text_embeds": second.text_embeds, "time_ids": torch.full((1, 6), 32.0)}
            outputs |= {"text_encoder_2": text, "text_embeds": second.text_embeds}
        outputs["unet"] = modules["unet"](latents, 999, text, added_cond_kwargs=conditions).sample
        outputs["vae"] = modules["vae"].decode(latents).sample
    return outputs


@pytest.mark.parametrize("checkpoint", ["tiny_sdxl", "tiny_sd"])
def test_modules_compute_exactly_what_diffusers_loads(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(checkpoint)
    ours = load(str(folder)).modules
    theirs = _diffusers_pipeline(folder).components
    two = "text_encoder_2" in ours
    expected = _outputs(theirs, two)
    for name, output in _outputs(ours, two).items():
        assert output.isfinite().all()
        assert torch.equal(output, expected[name]), name


def test_an_sdxl_model_comes_with_all_its_settings(tiny_sdxl: Path) -> None:
    model = load(str(tiny_sdxl))
    assert (model.name, model.family.name, model.folder, model.has_weights) == (
        "tiny_sdxl",
        "sdxl",
        tiny_sdxl,
        True,
    )
    assert list(model.modules) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert model.tokenizers == {
        "text_encoder": tiny_sdxl / "tokenizer",
        "text_encoder_2": tiny_sdxl / "tokenizer_2",
    }
    assert model.scheduler_config["_class_name"] == "EulerDiscreteScheduler"
    assert (model.image_size, model.vae_scale_factor) == ((32, 32), 2)


def test_a_setting_that_the_index_leaves_out_has_the_pipelines_default(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(str(folder)).pipeline_config == {"force_zeros_for_empty_prompt": True}


def test_modules_are_fp32_in_eval_mode_without_gradients(tiny_sd: Path) -> None:
    for module in load(str(tiny_sd)).modules.values():
        assert not any(part.training for part in module.modules())
        for tensor in module.parameters():
            assert (tensor.dtype, tensor.requires_grad) == (torch.float32, False)
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_families_have_distinct_pipeline_classes() -> None:
    classes = [name for family in FAMILIES.values() for name in family.pipeline_classes]
    assert len(set(classes)) == len(classes)


def _same_weights(one: LoadedModel, other: LoadedModel) -> bool:
    return all(
        torch.equal(tensor, other.modules[component].state_dict()[name])
        for component, module in one.modules.items()
        for name, tensor in module.state_dict().items()
    )


def _rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file)


def test_names_of_the_published_text_encoders_are_understood(sd_copy: Path, tiny_sd: Path) -> None:
    _rewrite(sd_copy / TEXT_FILE, lambda tensors: {f"text_model.{name}": t for name, t in tensors.items()})
    assert _same_weights(load(str(sd_copy)), load(str(tiny_sd)))


def test_names_of_the_first_published_vaes_are_understood(sd_copy: Path, tiny_sd: Path) -> None:
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(name: str) -> str:
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        return name

    _rewrite(sd_copy / VAE_FILE, lambda tensors: {renamed(name): t for name, t in tensors.items()})
    assert any(".proj_attn." in name for name in load_file(sd_copy / VAE_FILE))
    assert _same_weights(load(str(sd_copy)), load(str(tiny_sd)))


def test_the_position_ids_of_older_text_encoders_are_ignored(sd_copy: Path, tiny_sd: Path) -> None:
    extra = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
    _rewrite(sd_copy / TEXT_FILE, lambda tensors: tensors | extra)
    assert _same_weights(load(str(sd_copy)), load(str(tiny_sd)))


def test_sharded_weights_equal_whole_ones(sd_copy: Path, tiny_sd: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd_copy / "unet")
    (sd_copy / UNET_FILE).unlink()
    unet.save_pretrained(sd_copy / "unet", max_shard_size="1MB")
    assert (sd_copy / f"{UNET_FILE}.index.json").is_file()
    assert _same_weights(load(str(sd_copy)), load(str(tiny_sd)))


def test_a_variant_is_read_when_there_is_no_plain_file(sd_copy: Path, tiny_sd: Path) -> None:
    _rewrite(sd_copy / UNET_FILE, lambda tensors: {name: t.half() for name, t in tensors.items()})
    (sd_copy / UNET_FILE).rename(sd_copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    found, exact = load(str(sd_copy)).modules["unet"], load(str(tiny_sd)).modules["unet"]
    weight = found.get_parameter("conv_in.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact.get_parameter("conv_in.weight").half().float())


def test_the_plain_file_is_preferred_to_a_variant(sd_copy: Path, tiny_sd: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(sd_copy / UNET_FILE).items()}
    save_file(zeros, sd_copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert _same_weights(load(str(sd_copy)), load(str(tiny_sd)))


def test_a_header_tells_names_shapes_and_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
    }


def test_the_two_tokenizers_of_sdxl_pad_with_their_own_token(tiny_sdxl: Path) -> None:
    from tokenizers import Tokenizer

    model = load(str(tiny_sdxl))
    ids = {
        name: Tokenizer.from_str(tokenizer_json(folder, CLIP, 77).decode()).encode("a red cat").ids
        for name, folder in model.tokenizers.items()
    }
    assert [len(value) for value in ids.values()] == [77, 77]
    assert ids["text_encoder"][:5] == ids["text_encoder_2"][:5]
    assert (ids["text_encoder"][-1], ids["text_encoder_2"][-1]) == (ids["text_encoder"][4], 0)


def test_tokenizer_json_gives_the_ids_of_transformers(tiny_sdxl: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    folder = tiny_sdxl / "tokenizer_2"
    assert not (folder / "tokenizer.json").exists()
    ours = Tokenizer.from_str(tokenizer_json(folder, CLIP, 77).decode())
    theirs = CLIPTokenizer.from_pretrained(folder)
    for prompt in ("a Red  circle on the GREEN square", "", "naïve café, 3 猫!"):
        assert ours.encode(prompt).ids == theirs(prompt, padding="max_length").input_ids
