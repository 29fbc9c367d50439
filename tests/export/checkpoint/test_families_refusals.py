# SPDX-License-Identifier: Apache-2.0
"""Bad checkpoints: one clear error each, naming what was found and what is allowed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbopocket.export.checkpoint.load import load, load_shapes, tokenizer_json
from turbopocket.export.families.tokenizers import CLIP
from turbopocket.ground.errors import TurbopocketError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "broken"))


def _refused(folder: Path, *said: str) -> TurbopocketError:
    """Checks that loading fails and that the message has every part of `said`; returns the error."""
    with pytest.raises(TurbopocketError) as caught:
        load(str(folder))
    for part in said:
        assert part in str(caught.value)
    assert caught.value.exit_code == 1
    assert not str(caught.value).endswith(".")
    return caught.value


def _edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_tensors(file: Path, **changes: Tensor | None) -> None:
    """Replaces or adds tensors; None removes one. In names, `__` stands for a dot."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file)


def test_folder_without_model_index_is_refused(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    error = _refused(folder, "has no model_index.json", "unet/ (UNet2DConditionModel), vae/ (AutoencoderKL)")
    assert error.hint == "put the model_index.json of that pipeline beside them"


@pytest.mark.parametrize("content", ["{not json", "\udcff"])
def test_model_index_that_is_not_json_is_refused(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    _refused(folder, "model_index.json is not JSON")


def test_model_index_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")
    _refused(folder, "model_index.json holds a JSON list", "an object is needed")


def test_unknown_pipeline_class_is_refused_with_the_supported_ones(folder: Path) -> None:
    _edit_json(folder / "model_index.json", _class_name="FluxPipeline")
    _refused(folder, "'FluxPipeline'", "supported: StableDiffusionXLPipeline, StableDiffusionPipeline, LatentC")


def test_pipeline_without_one_of_its_parts_is_refused(folder: Path) -> None:
    _edit_json(folder / "model_index.json", text_encoder=[None, None])
    _refused(folder, "has no 'text_encoder', which every StableDiffusionPipeline needs")


def test_part_of_another_class_is_refused(folder: Path) -> None:
    _edit_json(folder / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    supported = "supported: ['diffusers', 'AutoencoderKL'] or ['diffusers', 'AutoencoderTiny']"
    _refused(folder, "'vae' is ['diffusers', 'AsymmetricAutoencoderKL']", supported)


def test_folder_of_another_class_than_the_index_names_is_refused(folder: Path) -> None:
    _edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    _refused(folder, "vae/config.json is of class 'AutoencoderKL'; supported: 'AutoencoderTiny'")


@pytest.mark.parametrize("part", ["unet", "tokenizer", "scheduler"])
def test_missing_component_folder_is_refused(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    _refused(folder, f"has no folder '{part}'")


@pytest.mark.parametrize("config", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_config_is_refused(folder: Path, config: str) -> None:
    (folder / config).unlink()
    _refused(folder, f"{config} does not exist")


def test_config_that_describes_no_model_is_refused(folder: Path) -> None:
    _edit_json(folder / "unet/config.json", down_block_types=["NoSuchBlock"] * 2)
    _refused(folder, "unet/config.json does not describe a UNet2DConditionModel", "NoSuchBlock")


def test_config_of_another_class_is_refused(folder: Path) -> None:
    _edit_json(folder / "unet/config.json", _class_name="ControlNetModel")
    _refused(folder, "unet/config.json is of class 'ControlNetModel'; supported: 'UNet2DConditionModel'")


@pytest.mark.parametrize(("key", "value"), [("class_embed_type", "timestep"), ("class_embed_type", "identity")])
def test_conditioning_that_our_graphs_lack_is_refused(folder: Path, key: str, value: object) -> None:
    _edit_json(folder / "unet/config.json", **{key: value})
    _refused(folder, f"{key} is {value!r}; supported: None")


def test_inpainting_unet_is_refused(folder: Path) -> None:
    _edit_json(folder / "unet/config.json", in_channels=9)
    _refused(folder, "the UNet takes 9 channels, the VAE's latents have 4", "inpainting")


def test_text_encoder_of_another_width_is_refused(folder: Path) -> None:
    _edit_json(folder / "unet/config.json", cross_attention_dim=64)
    _refused(folder, "the UNet takes text 64 wide, text_encoder give 32")


@pytest.mark.parametrize("size", [None, 0, True, 16.0, "16", [], [16], [16, 24, 1], [16, 0], [16, None]])
def test_picture_size_that_is_none_is_refused(folder: Path, size: object) -> None:
    _edit_json(folder / "unet/config.json", sample_size=size)
    assert re.search(r"a positive integer|whole numbers from 1", str(_refused(folder, f"sample_size is {size!r}; ")))


def test_bad_configs_are_refused_without_weights_too(folder: Path) -> None:
    _edit_json(folder / "unet/config.json", in_channels=9)
    with pytest.raises(TurbopocketError, match="inpainting"):
        load_shapes(str(folder))


@pytest.mark.parametrize("missing_bytes", [1, 4096])
def test_truncated_weights_are_refused_with_the_missing_bytes(folder: Path, missing_bytes: int) -> None:
    file = folder / UNET_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-missing_bytes])
    _refused(folder, str(file), f"{len(content)} needed", f"{missing_bytes} bytes missing")


def test_weights_cut_inside_their_header_are_refused(folder: Path) -> None:
    content = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(content[:100])
    _refused(folder, "is truncated: 100 bytes found", "its header alone")


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / UNET_FILE).open("ab") as stream:
        stream.write(b"12345")
    _refused(folder, "has 5 bytes after its last tensor, none are allowed")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip file, as torch.save writes", b"\x05" + bytes(7) + b"12345"]
)
def test_file_that_only_claims_to_be_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / UNET_FILE).write_bytes(content)
    _refused(folder, UNET_FILE, "is not a safetensors file")


def test_git_lfs_pointer_is_refused_with_the_way_to_fetch_it(folder: Path) -> None:
    (folder / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert _refused(folder, UNET_FILE, "is a Git LFS pointer").hint == "fetch it: git lfs pull"


def _write_raw(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            "x takes 4 bytes, its shape [2] in F32 needs 8",
        ),
        ({"dtype": "F32", "shape": [1]}, "bad header entry of 'x'"),
        ({"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}, "bad header entry of 'x'"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "bad header entry of 'x'"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]}, "bytes missing"),
    ],
)
def test_header_that_contradicts_itself_is_refused(folder: Path, entry: dict[str, Any], said: str) -> None:
    _write_raw(folder / UNET_FILE, {"x": entry}, bytes(4))
    _refused(folder, UNET_FILE, said)


def test_tensor_of_the_wrong_shape_is_refused(folder: Path) -> None:
    _edit_tensors(folder / UNET_FILE, conv_in__bias=torch.zeros(31))
    _refused(folder, UNET_FILE, "conv_in.bias has shape [31], config.json asks for [32]")


def test_missing_tensors_are_refused_by_name(folder: Path) -> None:
    _edit_tensors(folder / UNET_FILE, conv_in__bias=None, conv_out__weight=None)
    _refused(folder, "unet: 2 tensors are missing: conv_in.bias, conv_out.weight")


def test_unexpected_tensors_are_refused_by_name(folder: Path) -> None:
    _edit_tensors(folder / UNET_FILE, conv_in__lora=torch.zeros(1))
    _refused(folder, "unet: 1 tensors are not in the model of config.json: conv_in.lora")


def test_one_parameter_under_two_names_is_refused(folder: Path) -> None:
    _edit_tensors(folder / TEXT_FILE, text_model__final_layer_norm__bias=torch.zeros(32))
    _refused(folder, "text_model.final_layer_norm.bias", "are one parameter")


def test_quantized_weights_are_refused_with_the_allowed_dtypes(folder: Path) -> None:
    _edit_tensors(folder / UNET_FILE, conv_in__bias=torch.zeros(32, dtype=torch.int8))
    _refused(folder, "conv_in.bias is I8; allowed: F64, F32, F16, BF16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_their_count(folder: Path, bad: float) -> None:
    bias = torch.zeros(32)
    bias[3:5] = bad
    _edit_tensors(folder / UNET_FILE, conv_in__bias=bias)
    _refused(folder, UNET_FILE, "conv_in.bias has 2 of 32 values that are NaN or infinite")


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_pickled_weights_are_refused_by_file_name(folder: Path, suffix: str) -> None:
    (folder / UNET_FILE).rename(folder / f"unet/diffusion_pytorch_model.{suffix}")
    error = _refused(folder, f"only as pickles (diffusion_pytorch_model.{suffix})", "safetensors is allowed")
    assert ("save_pretrained" in (error.hint or "")) == (suffix == "bin")  # diffusers reads no other


def test_several_variants_without_a_plain_file_are_refused(folder: Path) -> None:
    for variant in ("fp16", "non_ema"):
        shutil.copy(folder / UNET_FILE, folder / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    (folder / UNET_FILE).unlink()
    _refused(folder, "2 variants", "diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.non_ema")


def _shard(folder: Path, weight_map: Any) -> None:
    (folder / UNET_FILE).rename(folder / "unet/part-00001-of-00001.safetensors")
    (folder / f"{UNET_FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (
            {"conv_in.bias": "part-00002-of-00002.safetensors"},
            "names the shard 'part-00002-of-00002.safetensors'",
        ),
        ({"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}, "which is no file beside it"),
        (
            {"conv_in.nothing": "part-00001-of-00001.safetensors"},
            "places conv_in.nothing in part-00001-of-00001",
        ),
        (["conv_in.bias"], "has no weight_map"),
        ({"conv_in.bias": 5}, "has no weight_map"),
    ],
)
def test_shard_index_that_does_not_hold_is_refused(folder: Path, weight_map: Any, said: str) -> None:
    _shard(folder, weight_map)
    _refused(folder, f"{UNET_FILE}.index.json", said)


def test_every_header_is_checked_before_any_values_are_read(folder: Path) -> None:
    """A text encoder full of NaN comes first in the pipeline, but the UNet's bad header is reported."""
    _edit_tensors(folder / TEXT_FILE, final_layer_norm__bias=torch.full((32,), float("nan")))
    _edit_tensors(folder / UNET_FILE, conv_in__bias=None)
    _refused(folder, "conv_in.bias")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_tokenizer_that_is_not_whole_is_refused(folder: Path, file: str) -> None:
    (folder / "tokenizer" / file).unlink()
    with pytest.raises(TurbopocketError, match=re.escape(file)):
        tokenizer_json(folder / "tokenizer", CLIP)


@pytest.mark.parametrize("content", ["{not json", "{}"])
def test_tokenizer_with_a_broken_vocabulary_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer/vocab.json").write_text(content)
    with pytest.raises(TurbopocketError, match="tokenizer cannot be read as a CLIP tokenizer"):
        tokenizer_json(folder / "tokenizer", CLIP)


def test_tokenizer_of_another_kind_is_refused(folder: Path) -> None:
    _edit_json(folder / "tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")
    with pytest.raises(TurbopocketError, match="tokenizer_class is 'T5Tokenizer'; supported: 'CLIPTokenizer' or"):
        tokenizer_json(folder / "tokenizer", CLIP)
