# SPDX-License-Identifier: Apache-2.0
"""What LoRA files call a model's layers, and the parts of a layer's change.

Every name that a file may use is made from the model's own modules, so what is looked up is exact, or is not there.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a file's names need no PyTorch
    from torch import nn

# kohya flattens paths: `lora_unet_down_blocks_0_...`; peft and diffusers do not: `unet.down_blocks.0...`. With dots
# read as underscores these are one spelling. The bare one is of the first diffusers files, which held a UNet only.
PREFIXES = {
    "unet": ("lora_unet_", "unet_", "diffusion_model_", "lycoris_", ""),
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_"),
}

# First diffusers files name attention processors instead of layers, and CLIP's layers as the UNet's.
_OLDER_NAMES = (
    (r"_processor_to_", "_to_"),
    (r"_to_out$", "_to_out_0"),
    (r"_self_attn_to_([qkv])$", r"_self_attn_\1_proj"),
    (r"_self_attn_to_out_0$", "_self_attn_out_proj"),
)

# Of a residual block, in the UNet of CompVis and Stability AI.
_RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

_DOWN = r"([._]lora\.down|\.lora_linear_layer\.down|\.lora_down|\.lora_A(\.[^.]+)?)"
_UP = r"([._]lora\.up|\.lora_linear_layer\.up|\.lora_up|\.lora_B(\.[^.]+)?)"
_PARTS = tuple(
    (re.compile(rf"(?P<layer>.+?){ending}", re.DOTALL), part)
    for ending, part in (
        (rf"{_DOWN}\.weight", "down"),
        (rf"{_UP}\.weight", "up"),
        (rf"{_UP}\.bias", "bias"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
        *((rf"\.{part}", part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
        *((rf"\.{part}", part) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
        *((rf"\.{part}", part) for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    )
)

# Adapters that are no sum of products, by the name of one tensor. What else people take for a LoRA is a model or a
# part of one, which `single_file` tells.
_OTHER_ADAPTERS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"dora_scale|lora_magnitude_vector", "a DoRA, whose magnitudes are no sum of weights"),
        (r"\.(oft_|boft_)", "an OFT or BOFT, which rotates weights"),
        (r"\.on_input$|ia3_l", "an IA3, which scales activations"),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA"),
        (r"\.(diff|diff_b|w_norm|b_norm)$", "a file with differences of whole weights"),
        (r"lora_embedding_[AB]", "a LoRA of embeddings"),
        (r"^base_model\.model\.", "an adapter as peft saves it, without its alpha"),
    )
)


def split_name(tensor: str) -> tuple[str, str] | None:
    """Returns (the layer as the file spells it, the part of its change), or None for no tensor of a LoRA.

    Parts are `down`, `mid`, `up` and `bias` of a LoRA, `hada_...` of a LoHa, `lokr_...` of a LoKr, and `alpha`.
    """
    for pattern, part in _PARTS:
        if match := pattern.fullmatch(tensor):
            return match["layer"], part
    return None


def other_adapter(tensor: str) -> str | None:
    """Returns what a file with a tensor of this name is, where that is an adapter but none that can be merged."""
    return next((kind for pattern, kind in _OTHER_ADAPTERS if pattern.search(tensor)), None)


class LayerNames:
    """Finds the module that a LoRA file means, among the Linear and Conv2d layers of text encoders and UNet."""

    def __init__(self, modules: "Mapping[str, nn.Module]") -> None:
        self._places: dict[str, tuple[str, str]] = {}
        for component, prefixes in PREFIXES.items():
            if component in modules:
                for path, name in _names(component, modules[component]):
                    self._places |= {prefix + name.replace(".", "_"): (component, path) for prefix in prefixes}

    def find(self, layer: str) -> tuple[str, str] | None:
        """Returns (component, module path) of a layer by any of its names, or None when no layer is called that."""
        flat = layer.replace(".", "_")
        for pattern, replacement in _OLDER_NAMES:
            flat = re.sub(pattern, replacement, flat)
        return self._places.get(flat)


def _names(component: str, module: "nn.Module") -> Iterator[tuple[str, str]]:
    """Yields (module path, a name without prefix), each layer's names one after the other."""
    from torch import nn

    blocks = list(_stability_blocks(module)) if component == "unet" else []
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        yield path, path
        if component != "unet":  # CLIP's outermost module, which transformers 5 dropped from some classes
            bare = path.removeprefix("text_model.")
            yield from ((path, bare), (path, f"text_model.{bare}"))
        for ours, theirs in blocks:
            if path == ours or path.startswith(f"{ours}."):
                rest = path.removeprefix(ours)
                yield path, theirs + (f".{_RESNET_LAYERS.get(rest[1:], rest[1:])}" if rest else "")


def _stability_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Yields (path in diffusers, path in the UNet of CompVis and Stability AI, which kohya trains for SDXL).

    There, `input_blocks` and `output_blocks` count residual blocks through all resolutions; an attention is the
    second module of its block, a downsampler a block of its own, an upsampler the last module of its block.
    """
    yield from (("conv_in", "input_blocks.0.0"), ("conv_out", "out.2"))
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"))
    index = 1
    for number, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks.{number}.resnets.{layer}", f"input_blocks.{index}.0"
            yield f"down_blocks.{number}.attentions.{layer}", f"input_blocks.{index}.1"
            index += 1
        if block.downsamplers:
            yield f"down_blocks.{number}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
            index += 1
    for layer in range(len(unet.mid_block.resnets) if unet.mid_block is not None else 0):
        yield f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}"
        yield f"mid_block.attentions.{layer}", f"middle_block.{2 * layer + 1}"
    index = 0
    for number, block in enumerate(unet.up_blocks):
        has_attention = bool(getattr(block, "attentions", None))
        for layer in range(len(block.resnets)):
            yield f"up_blocks.{number}.resnets.{layer}", f"output_blocks.{index}.0"
            yield f"up_blocks.{number}.attentions.{layer}", f"output_blocks.{index}.1"
            index += 1
        if block.upsamplers:
            yield f"up_blocks.{number}.upsamplers.0.conv", f"output_blocks.{index - 1}.{1 + has_attention}.conv"
