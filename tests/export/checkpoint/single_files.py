# SPDX-License-Identifier: Apache-2.0
"""Original (LDM, SGM) single files made from modules: the inverse of the mapping that the loader uses.

Written from the two layouts themselves: `input_blocks` count every resnet and downsampler of all levels in one row,
`output_blocks` the same upwards; VAE decoders count levels from the picture's side; OpenCLIP keeps query, key and
value in one matrix and multiplies by its text projection from the right.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

UNET_HEADS = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
)
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}


def unet_names(unet: Any) -> Iterator[tuple[str, str]]:
    """(diffusers' name, original name) of every tensor of a UNet."""
    for name in unet.state_dict():
        head = next((pair for pair in UNET_HEADS if name.startswith(pair[0])), None)
        yield name, name.replace(*head) if head else _in_a_block(name, unet.config)


def _in_a_block(name: str, config: Any) -> str:
    found = re.fullmatch(r"(\w+)(?:\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    assert found is not None, name
    blocks, kind, index, rest = found[1], found[3], int(found[4]), found[5]
    level, row = int(found[2] or 0), config.layers_per_block + 1
    if kind == "resnets":
        part, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[part]}.{leaf}"
    if blocks == "mid_block":
        return f"middle_block.{2 * index + (kind == 'attentions')}.{rest}"
    if kind.endswith("samplers"):
        index = row - 1
    if blocks == "down_blocks":
        within = 1 if kind == "attentions" else 0
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        return f"input_blocks.{1 + level * row + index}.{within}.{rest}"
    after_attention = config.up_block_types[level].startswith("CrossAttn")
    within = {"resnets": 0, "attentions": 1, "upsamplers": 2 if after_attention else 1}[kind]
    return f"output_blocks.{level * row + index}.{within}.{rest}"


def vae_names(vae: Any) -> Iterator[tuple[str, str]]:
    """(diffusers' name, original name) of every tensor of a VAE."""
    levels = len(vae.config.block_out_channels)
    for name in vae.state_dict():
        old = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        old = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", old)
        old = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", old)
        old = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", old)
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "mid_block.attentions.0." in old:
            old = old.replace("mid_block.attentions.0.", "mid.attn_1.")
            for new, original in VAE_ATTENTION.items():
                old = old.replace(f".{new}.", f".{original}.")
        yield name, old


def open_clip(text_encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a text encoder as OpenCLIP keeps them."""
    found: dict[str, Tensor] = {}
    state = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    for name, tensor in state.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif name.startswith("embeddings."):
            found["token_embedding.weight" if "token" in name else "positional_embedding"] = tensor
        elif name.startswith("final_layer_norm"):
            found[name.replace("final_layer_norm", "ln_final")] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(three)
        elif layer and layer[2] in OPEN_CLIP:
            found[f"transformer.resblocks.{layer[1]}.{OPEN_CLIP[layer[2]]}.{layer[3]}"] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def original(modules: Mapping[str, Any], conv_attention: bool = True) -> dict[str, Tensor]:
    """The modules' tensors in one dict, named and shaped as in a published single file.

    SDXL when there is a second text encoder; else SD 1.x. VAE attention is convolutions of 1 x 1, as published.
    """
    tensors: dict[str, Tensor] = {}
    is_sdxl = "text_encoder_2" in modules
    for name, module in modules.items():
        state = module.state_dict()
        if name == "unet":
            tensors |= {PREFIXES[name] + old: state[new] for new, old in unet_names(module)}
        elif name == "vae":
            for new, old in vae_names(module):
                is_matrix = "mid.attn_1" in old and state[new].ndim == 2 and conv_attention
                tensors[PREFIXES[name] + old] = state[new][:, :, None, None] if is_matrix else state[new]
        elif name == "text_encoder_2":
            tensors |= open_clip(module, "conditioner.embedders.1.model.")
        else:
            prefix = "conditioner.embedders.0.transformer.text_model." if is_sdxl else PREFIXES[name]
            tensors |= {prefix + key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    return tensors


def write_single_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """The file, now with these tensors."""
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        path,
        dict(metadata) if metadata else None,
    )
    return path


def write_sparse_file(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A file with the header of these (meta) tensors in fp16, and holes for their values."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        nbytes = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path
