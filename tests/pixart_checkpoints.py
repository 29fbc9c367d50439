# SPDX-License-Identifier: Apache-2.0
"""Tiny random PixArt checkpoints, laid out as `save_pretrained` of diffusers and transformers writes them.

The transformer is 96 wide, a multiple of 3 (as many embeddings make one where it is told sizes) and of 32.
"""

from pathlib import Path
from typing import Any

from .checkpoints import NOISE_SCHEDULE, vae
from .conftest import WORDS

PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPACE = "\u2581"
EXTRA_IDS = 100
EMBEDDINGS = 192
"""More than there are ids, as in the published encoders (32,128 for 32,100)."""
ALPHA_NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def vocabulary() -> list[tuple[str, float]]:
    """Pieces of a Unigram model with their scores: marks, then each of WORDS, then single letters."""
    words = [(SPACE + word, -2.0 - index / 100) for index, word in enumerate(WORDS)]
    letters = [(letter, -8.0) for letter in (SPACE, *"abcdefghijklmnopqrstuvwxyz0123456789.,")]
    extra = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(EXTRA_IDS))]
    return [(PADDING, 0.0), (END, 0.0), (UNKNOWN, 0.0), *words, *letters, *extra]


def t5_tokenizer() -> Any:
    """T5's tokenizer with that vocabulary, 512 ids long as the published ones say."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=vocabulary(), extra_ids=EXTRA_IDS, model_max_length=512)


def t5_encoder(**config: Any) -> Any:
    """An encoder of T5 1.1's kind: gated GELU, relative positions, no biases."""
    from transformers import T5Config, T5EncoderModel

    values = {
        "vocab_size": EMBEDDINGS,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    return T5EncoderModel(T5Config(**(values | config)))


def transformer(**config: Any) -> Any:
    """A transformer of Sigma's kind, of which half the output's channels are a variance."""
    from diffusers import PixArtTransformer2DModel

    values = {
        "num_attention_heads": 2,
        "attention_head_dim": 48,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 96,
        "caption_channels": 32,
        "sample_size": 16,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    }
    return PixArtTransformer2DModel(**(values | config))


def write_pixart(folder: Path, pipeline: str, sampler: Any, **config: Any) -> None:
    """Writes a folder of that pipeline class; `config` is the transformer's."""
    import diffusers
    import torch

    torch.manual_seed(0)
    getattr(diffusers, pipeline)(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer(**config),
        vae=vae(scaling_factor=0.13025 if pipeline == "PixArtSigmaPipeline" else 0.18215),
        scheduler=sampler,
    ).save_pretrained(folder)


def write_sigma(folder: Path) -> None:
    """PixArt-Sigma, with the DPM-Solver++ that it is published with."""
    from diffusers import DPMSolverMultistepScheduler

    write_pixart(folder, "PixArtSigmaPipeline", DPMSolverMultistepScheduler(**ALPHA_NOISE))


def write_alpha(folder: Path) -> None:
    """PixArt-Alpha for 1024 pixels, which is told resolution and aspect ratio; drawn by Euler."""
    from diffusers import EulerDiscreteScheduler

    sampler = EulerDiscreteScheduler(**(NOISE_SCHEDULE | ALPHA_NOISE))
    sizes = {"sample_size": 128, "interpolation_scale": None, "use_additional_conditions": None}
    write_pixart(folder, "PixArtAlphaPipeline", sampler, **sizes)
