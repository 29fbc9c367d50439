# SPDX-License-Identifier: Apache-2.0
"""The transformer stage of pocket-dit: a noise predictor with PixArt-Alpha's exact topology (Chen et al. 2023, arXiv
2310.00426) on latents of drawn scenes.

Shape suffixes: N pictures, S scenes, T ids, E text state width.
"""

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from ..render import SIDE
from ..scenes import Scene, scenes_of
from .loop import bfloat16_where_fast, fit, step_generator
from .muon import muon_and_adamw
from .t5 import WIDTH as TEXT_WIDTH
from .t5 import T5Text
from .unet import (
    CAPTION_DROPOUT,
    PICTURES_PER_SCENE,
    TRAIN_TIMESTEPS,
    WeightAverage,
    denoising_weights,
    encode_pictures,
)

HEADS, HEAD_WIDTH, BLOCKS, PATCH = 4, 64, 7, 2
LEARNING_RATE = 1.5e-3
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""As `pocket` has it: few-step students begin at timestep 799, where PixArt's own schedule has left next to nothing."""


def new_transformer() -> PixArtTransformer2DModel:
    """An untrained transformer: PixArt's blocks and conditioning at an eightieth of its weights."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=SIDE // 8,
        patch_size=PATCH,
        use_additional_conditions=False,
    )
    with torch.no_grad():
        # PixArt's start: the prediction is nothing, and no block listens to the caption yet.
        for layer in (transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.transformer_blocks)):
            layer.weight.zero_()
            layer.bias.zero_()
    return transformer


@dataclass(frozen=True)
class DitPool:
    """Everything the transformer sees, computed once.

    Attributes:
        latents: (S, pictures of each, 4, 8, 8), already times the VAE's scaling factor.
        tokens: (S, 2, T, E) half precision; both tellings of each scene.
        mask: (S, 2, T) bool.
        empty: (T, E), of the empty prompt, which the pipeline guides away from.
        empty_mask: (T,) bool.
    """

    latents: Tensor
    tokens: Tensor
    mask: Tensor
    empty: Tensor
    empty_mask: Tensor


@torch.no_grad()
def build_dit_pool(vae: AutoencoderKL, text: T5Text, scenes: tuple[Scene, ...], seed: int) -> DitPool:
    """Latents and text states of those scenes."""
    tokens, masks = [], []
    for first in range(0, len(scenes), 256):
        states = text([told.caption for scene in scenes[first : first + 256] for told in (scene, scene.mirrored)])
        tokens.append(states.tokens.half().unflatten(0, (-1, 2)))
        masks.append(states.mask.bool().unflatten(0, (-1, 2)))
    empty = text([""])
    return DitPool(
        encode_pictures(vae, scenes, seed),
        torch.cat(tokens),
        torch.cat(masks),
        empty.tokens[0].half(),
        empty.mask[0].bool(),
    )


def kept_dit_pool(file: Path, build: Callable[[], DitPool]) -> DitPool:
    """The pool of an earlier start of this run, or a new one, kept in `file`."""
    if not file.exists():
        scratch = file.with_suffix(".partial")
        torch.save(asdict(build()), scratch)
        scratch.replace(file)
    return DitPool(**torch.load(file, weights_only=True))


def dit_loss(
    transformer: nn.Module, pool: DitPool, shares: Tensor, pictures: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the predicted noise, min-SNR weighted, for so many pictures with a caption each.

    Timesteps are stratified over the batch; a tenth of the captions is the empty prompt.
    """

    def choose(high: int) -> Tensor:
        return torch.randint(high, (pictures,), generator=generator)

    scene_N, telling_N = choose(len(pool.latents)), choose(2)
    latents = pool.latents[scene_N, choose(PICTURES_PER_SCENE)]
    told_N = torch.rand(pictures, generator=generator) >= CAPTION_DROPOUT
    tokens = torch.where(told_N[:, None, None], pool.tokens[scene_N, telling_N], pool.empty).float()
    mask = torch.where(told_N[:, None], pool.mask[scene_N, telling_N], pool.empty_mask)
    strata = torch.randperm(pictures, generator=generator) + torch.rand(pictures, generator=generator)
    timesteps = (strata * (TRAIN_TIMESTEPS / pictures)).long().clamp(max=TRAIN_TIMESTEPS - 1)
    share = shares[timesteps][:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    noised = share.sqrt() * latents + (1 - share).sqrt() * noise
    with bfloat16_where_fast():
        predicted = transformer(noised, tokens, timesteps, encoder_attention_mask=mask, return_dict=False)[0]
    errors_N = (predicted.float() - noise).pow(2).mean((1, 2, 3))
    return (denoising_weights(shares[timesteps]) * errors_N).mean(), {"unweighted": errors_N.mean().item()}


def save_dit(folder: Path, text: T5Text, vae: AutoencoderKL, transformer: PixArtTransformer2DModel) -> None:
    """A complete half-precision pipeline folder at `folder`, replacing what was there; the arguments stay float32."""
    scratch, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for each in (scratch, old):
        shutil.rmtree(each, ignore_errors=True)
    PixArtAlphaPipeline(
        tokenizer=text.tokenizer,
        text_encoder=deepcopy(text.encoder).half(),
        vae=deepcopy(vae).half(),
        transformer=deepcopy(transformer).half(),
        scheduler=DPMSolverMultistepScheduler(**NOISE),
    ).save_pretrained(scratch)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def train_dit(
    folder: Path,
    vae_folder: Path,
    *,
    steps: int,
    pictures: int,
    seed: int,
    preview: Path,
    watch: Callable[[Path], None],
) -> None:
    """A trained transformer, in a full pipeline folder at `preview`, rewritten at every checkpoint.

    Args:
        folder: holds `t5/` of the earlier stage; `dit/` is written.
        vae_folder: of the VAE that made the latents, `pocket`'s.
        watch: called with `preview` after each rewrite.
    """
    torch.manual_seed(seed)
    text = T5Text.load(folder / "t5")
    vae = AutoencoderKL.from_pretrained(vae_folder).float().eval().requires_grad_(False)
    pool = kept_dit_pool(folder / "pool.pt", lambda: build_dit_pool(vae, text, scenes_of("train"), seed))
    transformer = new_transformer()
    transformer.set_default_attn_processor()  # for so few tokens, its plain products take half the time of fused ones
    average, shipped = WeightAverage(transformer), new_transformer()
    shares = DPMSolverMultistepScheduler(**NOISE).alphas_cumprod

    def save(step: int) -> None:
        for parameter, value in zip(shipped.parameters(), average.values, strict=True):
            parameter.data.copy_(value)
        save_dit(preview, text, vae, shipped)
        watch(preview)

    fit(
        folder / "dit",
        {"transformer": transformer, "average": average},
        muon_and_adamw(transformer.named_parameters(), lr=LEARNING_RATE, adamw_only=("pos_embed", "proj_out")),
        lambda step: dit_loss(transformer, pool, shares, pictures, step_generator(seed, step)),
        steps=steps,
        warmup_steps=100,
        after_step=average.update,
        on_checkpoint=save,
        log_every=20,
    )
