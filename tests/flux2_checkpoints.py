# SPDX-License-Identifier: Apache-2.0
"""A tiny random FLUX.2-klein, laid out as `save_pretrained` of diffusers and transformers writes it.

Qwen3 has as many layers as the pipeline reads states of; widths are multiples of 32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import WORDS

END, PADDING = "<|im_end|>", "<|endoftext|>"
TEXT_WIDTH, LATENT_CHANNELS = 32, 8


def qwen_tokenizer() -> Any:
    """Qwen's class with each of WORDS' letters as an id."""
    from transformers import Qwen2Tokenizer

    letters = sorted(set("".join(WORDS)) | {"\u0120"})  # how byte-level BPE writes a space
    vocabulary = {letter: index for index, letter in enumerate([*letters, PADDING, END])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token=PADDING, unk_token=None)


def qwen3(**config: Any) -> Any:
    """Grouped-query attention, norms of queries and keys, no biases, an embedding that is the head's weight too."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    values = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(values | config)))


def transformer(**config: Any) -> Any:
    """Joint and single blocks, all modulated by the same three layers."""
    from diffusers import Flux2Transformer2DModel

    values = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * TEXT_WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**(values | config))


def flux2_vae() -> Any:
    """A VAE that halves the picture once, whose latents the pipeline draws in patches of 2 x 2."""
    import torch
    from diffusers import AutoencoderKLFlux2

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32}
    vae = AutoencoderKLFlux2(**blocks, **sizes, latent_channels=LATENT_CHANNELS)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 4 * LATENT_CHANNELS))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 4 * LATENT_CHANNELS))
    return vae


def write_flux2(folder: Path) -> None:
    """Writes a Flux2KleinPipeline folder."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    torch.manual_seed(0)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer(),
        is_distilled=True,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Planned:
    """A kind of checkpoint of which nothing but a plan is made; `lacks` is what a build lacks, in that sentence."""

    what: str
    family: str
    scheduler: str
    make: Callable[[Path], None]
    lacks: str


PLANNED = (
    Planned(
        "FLUX.2-klein",
        "flux2-klein",
        "flow-matching Euler",
        write_flux2,
        "a build lacks a sampler that walks the straight lines of flow matching, prompts in Qwen's chat template, and "
        "a check against diffusers' pipeline",
    ),
)
