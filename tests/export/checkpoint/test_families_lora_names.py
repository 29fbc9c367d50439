# SPDX-License-Identifier: Apache-2.0
"""LoRA files name a layer in many ways; each finds that layer, in models of their real topology."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from turbopocket.export.checkpoint.lora.names import LayerNames, split_name

from ..published_sdxl import CLIP_L, OPENCLIP_BIG_G, UNET
from .lora_files import adaptable

SD_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}  # the class's defaults are Stable Diffusion 1.x


@pytest.fixture(scope="module")
def sdxl() -> dict[str, nn.Module]:
    """SDXL's text encoders and UNet as published, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights():
        return {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**OPENCLIP_BIG_G)),
            "unet": UNet2DConditionModel.from_config(UNET),
        }


@pytest.fixture(scope="module")
def sd_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        return UNet2DConditionModel(**SD_UNET)


def _flat(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


def _old_diffusers(prefix: str) -> Callable[[str], str]:
    """Names of attention processors, for the layers that those trained; else those of the release after."""

    def name(path: str) -> str:
        text = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.to_\1_lora", path).replace("out_proj", "to_out_lora")
        text = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2_lora", text)
        return f"{prefix}.{text}" if text.endswith("_lora") else f"{prefix}.{text}.lora"

    return name


UNET_DIALECTS = {
    "kohya": (_flat("lora_unet_"), ".lora_down.weight"),
    "peft": ("unet.{}".format, ".lora_A.weight"),
    "peft with the adapter's name": ("unet.{}".format, ".lora_A.default_0.weight"),
    "OneTrainer": ("lora_unet.{}".format, ".lora_down.weight"),
    "ComfyUI": ("diffusion_model.{}".format, ".lora_down.weight"),
    "LyCORIS without kohya": (_flat("lycoris_"), ".lokr_w1"),
    "UNet alone": ("{}".format, ".lora_A.weight"),
    "older diffusers": (_old_diffusers("unet"), ".down.weight"),
}


@pytest.mark.parametrize("dialect", UNET_DIALECTS)
def test_unet_layers_are_found_by_their_paths(sdxl: dict[str, nn.Module], sd_unet: Any, dialect: str) -> None:
    name, ending = UNET_DIALECTS[dialect]
    for modules in (sdxl, {"unet": sd_unet}):
        names = LayerNames(modules)
        for path in adaptable(modules["unet"]):
            spelled, _ = split_name(name(path) + ending) or ("", "")
            assert names.find(spelled) == ("unet", path), spelled


TEXT_DIALECTS = {
    "kohya": (_flat("lora_te{}_"), ".lora_down.weight"),
    "peft": ("text_encoder{}.{}".format, ".lora_A.weight"),
    "older diffusers": (_old_diffusers("text_encoder{}"), ".down.weight"),
    "diffusers": ("text_encoder{}.{}".format, ".lora_linear_layer.down.weight"),
}


@pytest.mark.parametrize("outer", ["text_model.", ""])
@pytest.mark.parametrize("dialect", TEXT_DIALECTS)
def test_text_encoder_layers_are_found_by_their_paths(sdxl: dict[str, nn.Module], dialect: str, outer: str) -> None:
    names = LayerNames(sdxl)
    for component, (kohya, diffusers) in {"text_encoder": ("1", ""), "text_encoder_2": ("2", "_2")}.items():
        for path in adaptable(sdxl[component]):
            bare = outer + path.removeprefix("text_model.")
            spelled = {
                "kohya": _flat(f"lora_te{kohya}_")(bare),
                "older diffusers": _old_diffusers(f"text_encoder{diffusers}")(bare),
            }.get(dialect, f"text_encoder{diffusers}.{bare}")
            found, part = split_name(spelled + TEXT_DIALECTS[dialect][1]) or ("", "")
            assert (names.find(found), part) == ((component, path), "down"), spelled


def test_one_text_encoder_is_called_te_without_a_number(sdxl: dict[str, nn.Module]) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    path = next(path for path in adaptable(sdxl["text_encoder"]) if path.endswith("layers.0.self_attn.q_proj"))
    assert LayerNames(sdxl).find(name) == ("text_encoder", path)


def _stability_unet(
    depths: tuple[int, ...], middle: int, resnets: int, widths: tuple[int, ...], label: bool
) -> Iterator[str]:
    """Yields the layers of Stability AI's UNet as its constructor builds them, from the widths of its levels.

    `depths` counts the transformer blocks of each attention by level, 0 for levels without attention.
    """

    def resnet(place: str, into: int, out: int) -> Iterator[str]:
        yield from (f"{place}.in_layers.2", f"{place}.emb_layers.1", f"{place}.out_layers.3")
        if into != out:
            yield f"{place}.skip_connection"

    def transformer(place: str, depth: int) -> Iterator[str]:
        yield from (f"{place}.proj_in", f"{place}.proj_out") if depth else ()
        for block in (f"{place}.transformer_blocks.{number}" for number in range(depth)):
            yield from (f"{block}.attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
            yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")

    yield from ("time_embed.0", "time_embed.2", "out.2", "input_blocks.0.0")
    yield from ("label_emb.0.0", "label_emb.0.2") if label else ()
    count, now, skipped = 1, widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(resnets):
            yield from resnet(f"input_blocks.{count}.0", now, width)
            yield from transformer(f"input_blocks.{count}.1", depths[level])
            count, now = count + 1, width
            skipped.append(now)
        if level < len(widths) - 1:
            yield f"input_blocks.{count}.0.op"
            count += 1
            skipped.append(now)
    yield from (*resnet("middle_block.0", now, now), *resnet("middle_block.2", now, now))
    yield from transformer("middle_block.1", middle)
    count = 0
    for level, width in reversed(list(enumerate(widths))):
        for last in [False] * resnets + [level > 0]:
            yield from resnet(f"output_blocks.{count}.0", now + skipped.pop(), width)
            yield from transformer(f"output_blocks.{count}.1", depths[level])
            if last:
                yield f"output_blocks.{count}.{2 if depths[level] else 1}.conv"
            count, now = count + 1, width


SDXL_LAYERS = tuple(_stability_unet((0, 2, 10), 10, 2, (320, 640, 1280), label=True))
SD_LAYERS = tuple(_stability_unet((1, 1, 1, 0), 1, 2, (320, 640, 1280, 1280), label=False))


def test_layers_of_stability_ais_unet_are_all_of_ours(sdxl: dict[str, nn.Module], sd_unet: Any) -> None:
    for modules, layers in ((sdxl, SDXL_LAYERS), ({"unet": sd_unet}, SD_LAYERS)):
        names = LayerNames(modules)
        found = {names.find(f"lora_unet_{layer.replace('.', '_')}") for layer in layers}
        assert found == {("unet", path) for path in adaptable(modules["unet"])}
        assert len(found) == len(layers)


def test_stability_ais_names_mean_the_layers_that_diffusers_takes(sdxl: dict[str, nn.Module]) -> None:
    from diffusers import StableDiffusionXLPipeline

    unet: Any = sdxl["unet"]
    names = LayerNames(sdxl)
    for layer in SDXL_LAYERS:
        spelled = f"lora_unet_{layer.replace('.', '_')}"
        tensors = {f"{spelled}.lora_{part}.weight": torch.zeros(1) for part in ("down", "up")}
        theirs = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)[0]
        path = next(iter(theirs)).removeprefix("unet.").replace(".processor", "").partition(".down.")[0]
        path = re.sub(r"[._]lora$", "", path)
        path = re.sub(r"to_out$", "to_out.0", path)
        assert names.find(spelled) == ("unet", path), spelled


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_11_0_in_layers_2", "down_blocks.3.resnets.1.conv1"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
    ],
)
def test_stability_ais_names_of_stable_diffusion_1(sd_unet: Any, name: str, path: str) -> None:
    assert LayerNames({"unet": sd_unet}).find(f"lora_unet_{name}") == ("unet", path)


def test_unet_without_a_middle_has_no_names_for_one() -> None:
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel(**SD_UNET, mid_block_type=None)
    names = LayerNames({"unet": unet})
    assert names.find("lora_unet_middle_block_0_in_layers_2") is None
    assert names.find("lora_unet_output_blocks_0_0_in_layers_2") == ("unet", "up_blocks.0.resnets.0.conv1")
