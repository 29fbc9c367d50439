# SPDX-License-Identifier: Apache-2.0
"""What can not be merged whole is refused in one sentence that names the file and a tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from turbopocket.export.checkpoint.load import load
from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.checkpoint.lora.merge import merge_lora
from turbopocket.export.families.base import LoadedModel
from turbopocket.ground.errors import TurbopocketError

from .lora_files import copied, kohya, merged

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
LAYER, CONV_LAYER = kohya(TO_Q), kohya(CONV)


@pytest.fixture(scope="module")
def base(tiny_sdxl: Path) -> LoadedModel:
    return load(str(tiny_sdxl))


def _whole(layer: str = LAYER, width: int = 32, rank: int = 4) -> dict[str, Tensor]:
    return {f"{layer}.lora_down.weight": torch.ones(rank, width), f"{layer}.lora_up.weight": torch.ones(32, rank)}


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


OTHER_FILES = {
    "DoRA": (_whole() | {f"{LAYER}.dora_scale": _zeros(1, 32)}, "is a DoRA, .*1 of its 3 tensors, .*dora_scale"),
    "peft's DoRA": (
        {f"unet.{TO_Q}.lora_A.weight": _zeros(4, 32), f"unet.{TO_Q}.lora_magnitude_vector": _zeros(32)},
        "is a DoRA",
    ),
    "OFT": ({f"{LAYER}.oft_blocks": _zeros(4, 8, 8), f"{LAYER}.alpha": torch.tensor(1.0)}, "is an OFT or BOFT"),
    "BOFT": ({f"unet.{TO_Q}.boft_R": _zeros(4, 8, 8)}, "is an OFT or BOFT"),
    "IA3": ({f"{LAYER}.weight": _zeros(32), f"{LAYER}.on_input": _zeros(1)}, "is an IA3"),
    "GLoRA": ({f"{LAYER}.a1.weight": _zeros(4, 32), f"{LAYER}.b1.weight": _zeros(4, 32)}, "is a GLoRA"),
    "differences": (_whole() | {f"{LAYER}.diff_b": _zeros(32)}, "differences of whole weights: 1 of its 3 .*diff_b"),
    "norms": (_whole() | {"lora_unet_conv_norm_out.w_norm": _zeros(32)}, "differences of whole weights"),
    "embeddings": ({"text_encoder.token_embedding.lora_embedding_A": _zeros(4, 9)}, "is a LoRA of embeddings"),
    "peft": ({f"base_model.model.{TO_Q}.lora_A.weight": _zeros(4, 32)}, "as peft saves it, without its alpha"),
    "ControlNet": ({"input_hint_block.0.weight": _zeros(4)}, "is a ControlNet"),
    "IP-Adapter": ({"image_proj.proj.weight": _zeros(4)}, "is an IP-Adapter"),
    "textual inversion": ({"clip_l": _zeros(2, 32), "clip_g": _zeros(2, 64)}, "is a textual inversion: 2 of its 2"),
    "diffusers' inversion": ({"<größe>": _zeros(1, 32)}, "is a textual inversion.*'<größe>' of shape .1, 32."),
    "checkpoint": (
        {f"model.diffusion_model.{name}.weight": _zeros(4, 4) for name in ("out.2", "input_blocks.0.0")},
        "2 of its 2 tensors, such as 'model.diffusion_model",
    ),
    "VAE": ({"first_stage_model.encoder.conv_in.weight": _zeros(4)}, "is a VAE only: 1 of its 1 tensors"),
    "weights of something": ({"fc.weight": _zeros(3)}, "is no checkpoint of a diffusion model .*1 of its 1 tensors"),
    "unknown": (_whole() | {"line\nbreak": _zeros(1)}, r"not all a LoRA: 1 of its 3 .*'line\\nbreak'"),
    "bias of the down projection": (_whole() | {f"{LAYER}.lora_A.bias": _zeros(4)}, "not all a LoRA.*lora_A.bias"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_file_of_another_kind_is_named(base: LoadedModel, tmp_path: Path, name: str) -> None:
    tensors, said = OTHER_FILES[name]
    with pytest.raises(TurbopocketError, match=said) as refused:
        merged(base, tensors, tmp_path)
    assert str(refused.value).endswith("allowed: LoRA, LoCon, LoHa and LoKr for text encoders and UNet")
    assert "\n" not in str(refused.value)


def _loha(**changed: Tensor) -> dict[str, Tensor]:
    parts = {f"w{n}_{x}": torch.ones((32, 4) if x == "a" else (4, 32)) for n in (1, 2) for x in "ab"}
    return {f"{LAYER}.hada_{part}": values for part, values in (parts | changed).items()}


def _lokr(**parts: Tensor) -> dict[str, Tensor]:
    return {f"{LAYER}.lokr_{part}": values for part, values in parts.items()}


def _with(part: str, values: Tensor) -> dict[str, Tensor]:
    return _whole() | {f"{LAYER}.{part}": values}


BAD_LAYERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown layer": (
        _whole() | _whole("unet.nowhere.to_q"),
        "1 of its 2 layers are not in tiny_sdxl, such as 'unet.nowhere.to_q'; all must be",
    ),
    "layer that is no Linear": (_whole("lora_unet_conv_norm_out"), "1 of its 1 layers are not in"),
    "VAE": (_whole("vae.encoder.conv_in"), "such as 'vae.encoder.conv_in'"),
    "no up": ({f"{LAYER}.lora_down.weight": _zeros(4, 32)}, "lora_down.weight is all it holds of one layer"),
    "alpha alone": ({f"{LAYER}.alpha": torch.tensor(1.0)}, "alpha is all it holds of one layer"),
    "two methods": (_whole() | _loha(), "is all it holds of one layer, which is not whole"),
    "half a core": (_loha(t1=_zeros(4, 4, 1, 1)), "hada_t1, .*is all it holds of one layer"),
    "two dialects": (_whole() | _whole(f"unet.{TO_Q}"), f"are both of unet.{TO_Q}; one is allowed"),
    "two names of kohya": (_whole() | _whole("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"), "both of"),
    "two adapters": (
        {f"unet.{TO_Q}.lora_A.{name}.weight": _zeros(4, 32) for name in "ab"},
        "lora_A.a.weight' and .*lora_A.b.weight' are both of",
    ),
    "narrow": (
        _whole(width=31),
        rf"lora_down.weight has shape \[4, 31\]; unet.{TO_Q} of tiny_sdxl, whose weight is \[32, 32\], needs \[4, 32\]",
    ),
    "rank of up": (_with("lora_up.weight", _zeros(32, 5)), r"lora_up.weight has shape \[32, 5\].* needs \[32, 4\]"),
    "rank 0": (_whole(rank=0), "lora_down.weight has shape .* needs a rank of 1 or more"),
    "vector": (_with("lora_down.weight", _zeros(32)), "needs 2 or 4 dimensions"),
    "number": (_with("lora_up.weight", _zeros()), "needs 2 or 4 dimensions"),
    "LoRA of a Linear for nine taps": (_whole(CONV_LAYER), r"needs \[4, 32, 3, 3\]"),
    "taps for a Linear": (_with("lora_down.weight", _zeros(4, 32, 3, 3)), r"needs \[4, 32\]"),
    "core of another rank": (_with("lora_mid.weight", _zeros(1, 1, 1, 1)), r"lora_mid.weight .* needs \[4, 4\]"),
    "bias": (_with("lora_B.bias", _zeros(1)), "both of|has shape"),
    "kohya's bias": (_with("lora_up.bias", _zeros(1)), r"lora_up.bias has shape \[1\].* needs \[32\]"),
    "LoHa that would broadcast": (_loha(w2_a=torch.ones(1, 4)), r"hada_w2_a has shape \[1, 4\].* needs \[32, 4\]"),
    "LoHa of two ranks": (_loha(w2_a=_zeros(32, 2), w2_b=_zeros(2, 32)), r"hada_w2_a .* needs \[32, 4\]"),
    "LoKr of 5 rows": (_lokr(w1=_zeros(5, 4), w2=_zeros(6, 8)), r"lokr_w1 .* that divide \[32, 32\]"),
    "empty LoKr": (_lokr(w1=_zeros(0, 4), w2=_zeros(6, 8)), r"lokr_w1 .* that divide \[32, 32\]"),
    "LoKr": (_lokr(w1=_zeros(4, 4), w2=_zeros(8, 7)), r"lokr_w2 has shape \[8, 7\].* needs \[8, 8\]"),
    "alphas": (_with("alpha", _zeros(2)), r"alpha has shape \[2\]; allowed: one number"),
    "no alpha": (_with("alpha", _zeros(0)), r"alpha has shape \[0\]; allowed: one number"),
    "alpha 0": (
        _with("alpha", _zeros()),
        "alpha is 0, which is the rank to some programs and no change to",
    ),
    "alpha NaN": (_with("alpha", torch.tensor(float("nan"))), "alpha has 1 of 1 values that are NaN or infinite"),
    "alpha infinite": (_with("alpha", torch.tensor(float("-inf"))), "alpha has 1 of 1 values that are NaN"),
    "boolean alpha": (_with("alpha", torch.tensor(True)), "alpha is BOOL"),
    "NaN": (_with("lora_up.weight", torch.full((32, 4), float("nan"))), "lora_up.weight has 128 of 128 values"),
    "integers": (_with("lora_up.weight", torch.ones(32, 4, dtype=torch.int8)), "is I8; allowed: F64, F32, F16, BF16"),
    "fp8": (_with("lora_up.weight", torch.ones(32, 4).to(torch.float8_e4m3fn)), "is F8_E4M3; allowed"),
    "overflow": (
        _with("alpha", torch.tensor(3e38)),
        f"lora.safetensors at strength 100 makes unet.{TO_Q}.weight overflow fp32",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_layer_that_can_not_be_merged_is_named(base: LoadedModel, tmp_path: Path, name: str) -> None:
    tensors, said = BAD_LAYERS[name]
    with pytest.raises(TurbopocketError, match=said) as refused:
        merged(base, tensors, tmp_path, strength=100.0 if name == "overflow" else 1.0)
    assert str(tmp_path / "lora.safetensors") in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "pattern": ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a|a)*$": 2}}, r"alpha_pattern has '\(a\|a\)\*\$'"),
    "patterns in a list": ({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}, "alpha_pattern is a JSON list"),
    "no alpha": ({"unet.r": 4}, "alpha is None; allowed: a finite number other than 0"),
    "alpha 0": ({"unet.lora_alpha": 0}, "alpha is 0;"),
    "alpha NaN": ({"unet.lora_alpha": float("nan")}, "alpha is nan;"),
    "long alpha": ({"unet.lora_alpha": 10**400}, "alpha is 1000*;"),
    "true": ({"unet.lora_alpha": True}, "alpha is True;"),
    "another method": ({"unet.alpha": 1, "unet.peft_type": "LOKR"}, "peft_type is 'LOKR'; allowed: 'LORA'"),
    "list": ([], "holds a JSON list"),
    "UNet alone": ({"lora_alpha": "4"}, "of unet: alpha is '4'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_config_that_does_not_say_the_alpha_is_refused(base: LoadedModel, tmp_path: Path, name: str) -> None:
    config, said = BAD_CONFIGS[name]
    with pytest.raises(TurbopocketError, match=f"lora.safetensors: lora_adapter_metadata .*{said}"):
        merged(base, _whole(), tmp_path, metadata={"lora_adapter_metadata": json.dumps(config)})


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000])
def test_config_that_is_not_json_is_refused(base: LoadedModel, tmp_path: Path, text: str) -> None:
    with pytest.raises(TurbopocketError, match="lora_adapter_metadata is not JSON"):
        merged(base, _whole(), tmp_path, metadata={"lora_adapter_metadata": text})


@pytest.mark.parametrize("metadata", ["5", '{"a": 5}', '{"lora_adapter_metadata": {}}'])
def test_header_that_safetensors_refuses_is_one_sentence(base: LoadedModel, tmp_path: Path, metadata: str) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(_whole(), file)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip().replace(b"{", b'{"__metadata__":' + metadata.encode() + b",", 1)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(TurbopocketError, match="lora.safetensors"):
        merge_lora(copied(base), LoraFile(file))


@pytest.mark.parametrize("what", ["header", "values"])
def test_whatever_a_library_raises_is_one_sentence(
    base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line:\n  second line.")

    library = {"header": "header.parse_json", "values": "weights.safe_open"}[what]
    save_file(_whole(), tmp_path / "lora.safetensors")
    model = copied(base)
    monkeypatch.setattr(f"turbopocket.export.checkpoint.{library}", broken)
    with pytest.raises(TurbopocketError, match=rf"the {what} of .* can not be read: first line: second line$"):
        merge_lora(model, LoraFile(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_header_that_python_can_not_read_is_one_sentence(base: LoadedModel, tmp_path: Path, header: bytes) -> None:
    (tmp_path / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TurbopocketError, match=r"lora\.safetensors"):
        merge_lora(copied(base), LoraFile(tmp_path / "lora.safetensors"))


def test_lora_of_another_model_is_refused(tiny_sd: Path, base: LoadedModel, tmp_path: Path) -> None:
    save_file(_whole(), tmp_path / "lora.safetensors")
    with pytest.raises(TurbopocketError, match=r"1 of its 1 layers are not in tiny_sd, such as 'lora_unet_"):
        load(str(tiny_sd), [LoraFile(tmp_path / "lora.safetensors")])


def test_only_files_that_are_safetensors_are_read(base: LoadedModel, tmp_path: Path) -> None:
    save_file(_whole(), tmp_path / "lora.safetensors")
    for name, said in {
        "none.safetensors": "the LoRA .*none.safetensors does not exist; allowed: a .safetensors file",
        "lora.pt": r"is a \.pt file; allowed: \.safetensors",
        "lora": r"is a nameless file; allowed: \.safetensors",
    }.items():
        if "none" not in name:
            shutil.copy(tmp_path / "lora.safetensors", tmp_path / name)
        with pytest.raises(TurbopocketError, match=said):
            merge_lora(copied(base), LoraFile(tmp_path / name))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(TurbopocketError, match=r"folder\.safetensors is a folder; allowed: a \.safetensors file"):
        merge_lora(copied(base), LoraFile(tmp_path / "folder.safetensors"))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02 a pickle in disguise")
    with pytest.raises(TurbopocketError, match="is not a safetensors file"):
        merge_lora(copied(base), LoraFile(tmp_path / "pickle.safetensors"))
