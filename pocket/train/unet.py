# SPDX-License-Identifier: Apache-2.0
"""The UNet stage: a noise predictor with SDXL's exact topology, on latents of drawn scenes.

Shape suffixes: N pictures, B captions, T text tokens, E text state width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..render import SIDE, render
from ..scenes import Scene, scenes_of
from .assemble import save_pipeline, scheduler
from .loop import bfloat16_where_fast, fit, step_generator
from .muon import muon_and_adamw
from .shared_captions import folded_state, share_captions
from .text import POOLED_WIDTH, WIDTHS, TextEncoders

TIME_IDS = (SIDE, SIDE, 0, 0, SIDE, SIDE)  # original size, crop, target size, as the pipeline passes them
TIME_ID_WIDTH = 32
TRAIN_TIMESTEPS = 1000
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
CAPTION_DROPOUT = 0.1
PICTURES_PER_SCENE = 3
PICTURES_PER_CAPTION = 4  # in one batch
EMA_DECAY = 0.998


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet: SDXL's blocks, attention layout and conditioning, at a thousandth of its weights."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + len(TIME_IDS) * TIME_ID_WIDTH,
        norm_num_groups=32,
    )


@dataclass(frozen=True)
class Pool:
    """Everything the UNet sees, computed once.

    Attributes:
        latents: (scenes, pictures per scene, 4, 8, 8), already times the VAE's scaling factor.
        tokens: (scenes, 2, T, E) half precision; both tellings of each scene, divided by `token_scales`.
        pooled: (scenes, 2, 128), divided by `pooled_scales`.
        token_scales, pooled_scales: root mean square of each channel of the raw states.
    """

    latents: Tensor
    tokens: Tensor
    pooled: Tensor
    token_scales: Tensor
    pooled_scales: Tensor


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, scenes: tuple[Scene, ...], seed: int) -> Tensor:
    """(scenes, `PICTURES_PER_SCENE`, 4, 8, 8) scaled latents of freshly drawn pictures."""
    batches = []
    for first in range(0, len(scenes), 256):
        batch, generator = scenes[first : first + 256], step_generator(seed, first)
        pictures = render([scene for scene in batch for _ in range(PICTURES_PER_SCENE)], generator)
        with bfloat16_where_fast():
            latents = vae.encode(2 * pictures - 1).latent_dist.sample(generator).float()
        batches.append(latents.unflatten(0, (-1, PICTURES_PER_SCENE)) * vae.config.scaling_factor)
    return torch.cat(batches)


def encode_captions(encoders: TextEncoders, scenes: tuple[Scene, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Pool`'s tokens, pooled and their channel scales for both tellings of every scene."""
    tokens, pooled = [], []
    scales: tuple[Tensor, Tensor] | None = None
    for first in range(0, len(scenes), 128):
        told_twice = [told.caption for scene in scenes[first : first + 128] for told in (scene, scene.mirrored)]
        states = encoders.states(told_twice)
        if scales is None:
            spread = states.tokens.pow(2).mean((0, 1)).sqrt(), states.pooled.pow(2).mean(0).sqrt()
            scales = spread[0].clamp(min=1e-3), spread[1].clamp(min=1e-3)
        tokens.append((states.tokens / scales[0]).half().unflatten(0, (-1, 2)))
        pooled.append((states.pooled / scales[1]).unflatten(0, (-1, 2)))
    if scales is None:
        raise ValueError("no scenes to encode")
    return torch.cat(tokens), torch.cat(pooled), *scales


def build_pool(vae: AutoencoderKL, encoders: TextEncoders, seed: int) -> Pool:
    """Latents and text states of every training scene."""
    scenes = scenes_of("train")
    return Pool(encode_pictures(vae, scenes, seed), *encode_captions(encoders, scenes))


def kept_pool(file: Path, build: Callable[[], Pool]) -> Pool:
    """The pool of an earlier start of this run, or a new one, kept in `file`."""
    if not file.exists():
        torch.save(asdict(build()), file)
    return Pool(**torch.load(file, weights_only=True))


def denoising_weights(shares_N: Tensor) -> Tensor:
    """Min-SNR weights for noise prediction, from the share of signal power at each timestep, 0 to 1."""
    ratio = shares_N / (1 - shares_N)
    return ratio.clamp(max=MIN_SNR_GAMMA) / ratio


def denoising_loss(
    unet: nn.Module, pool: Pool, shares: Tensor, captions: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the predicted noise, min-SNR weighted, for `captions` captions of four pictures each.

    Timesteps are stratified over the batch; a tenth of the captions is replaced by zeros, which is what
    SDXL's pipeline feeds as the empty prompt.
    """
    count = captions * PICTURES_PER_CAPTION

    def choose(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    scene_B, telling_B = choose(len(pool.latents), captions), choose(2, captions)
    picture_N = choose(PICTURES_PER_SCENE, count)
    latents = pool.latents[scene_B.repeat_interleave(PICTURES_PER_CAPTION), picture_N]
    kept_B = (torch.rand(captions, generator=generator) >= CAPTION_DROPOUT).float()
    tokens = pool.tokens[scene_B, telling_B].float() * kept_B[:, None, None]
    pooled = pool.pooled[scene_B, telling_B] * kept_B[:, None]
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    timesteps = (strata * (TRAIN_TIMESTEPS / count)).long().clamp(max=TRAIN_TIMESTEPS - 1)
    share = shares[timesteps][:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    conditions = {
        "text_embeds": pooled.repeat_interleave(PICTURES_PER_CAPTION, 0),
        "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32).expand(count, -1),
    }
    noised = share.sqrt() * latents + (1 - share).sqrt() * noise
    with bfloat16_where_fast():
        predicted = unet(noised, timesteps, tokens, added_cond_kwargs=conditions, return_dict=False)[0]
    errors_N = (predicted.float() - noise).pow(2).mean((1, 2, 3))
    return (denoising_weights(shares[timesteps]) * errors_N).mean(), {"unweighted": errors_N.mean().item()}


class WeightAverage:
    """Exponential average of a module's parameters, with a short memory at the start."""

    def __init__(self, module: nn.Module) -> None:
        self._live = [p.detach() for p in module.parameters()]
        self.values = [p.clone() for p in self._live]

    def update(self, step: int) -> None:
        """Move towards the live weights."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self._live, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights."""
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the averaged weights of a checkpoint."""
        for value, held in zip(self.values, state_dict["values"], strict=True):
            value.copy_(held)


def train_unet(
    folder: Path, *, steps: int, captions: int, seed: int, preview: Path, watch: Callable[[Path], None]
) -> None:
    """A trained UNet, in a full pipeline folder at `preview`, rewritten at every checkpoint.

    Args:
        folder: holds `text/` and `vae/` of the earlier stages; `unet/` is written.
        watch: called with `preview` after each rewrite.
    """
    torch.manual_seed(seed)
    encoders = TextEncoders.load(folder / "text")
    vae = AutoencoderKL.from_pretrained(folder / "vae" / "vae").eval().requires_grad_(False)
    pool = kept_pool(folder / "pool.pt", lambda: build_pool(vae, encoders, seed))
    unet = new_unet()
    average, shipped = WeightAverage(unet), new_unet()
    share_captions(unet)
    shares = scheduler().alphas_cumprod

    def save(step: int) -> None:
        for parameter, value in zip(shipped.parameters(), average.values, strict=True):
            parameter.data.copy_(value)
        shipped.load_state_dict(folded_state(shipped, pool.token_scales, pool.pooled_scales))
        save_pipeline(preview, encoders, vae, shipped)
        watch(preview)

    fit(
        folder / "unet",
        {"unet": unet, "average": average},
        muon_and_adamw(unet.named_parameters(), lr=1.5e-3, adamw_only=("conv_in", "conv_out")),
        lambda step: denoising_loss(unet, pool, shares, captions, step_generator(seed, step)),
        steps=steps,
        warmup_steps=150,
        after_step=average.update,
        on_checkpoint=save,
    )
