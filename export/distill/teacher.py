# SPDX-License-Identifier: Apache-2.0
"""What a teacher was trained on, and which teachers can not be distilled."""

from typing import Any

import torch

from ...ground.errors import TurbopocketError
from ...quant.distill.diffusion import Diffusion
from ...runtimes.schedule import SamplerSpec, alphas_cumprod
from ...runtimes.scheduler_classes import config_for
from ..families.base import LoadedModel

LEAST_HORIZON = 100


def require_plain(model: LoadedModel) -> None:
    """Raises TurbopocketError for a teacher without a UNet, which alone is trained here, and for one that is told its
    guidance: it is asked with and without a prompt here."""
    if "unet" not in model.modules:
        raise TurbopocketError(
            f"{model.name} can not be distilled: it has a {model.family.denoiser}, a teacher must have a UNet"
        )
    config: Any = model.modules["unet"].config
    if config.time_cond_proj_dim is not None:
        raise TurbopocketError(
            f"{model.name} can not be distilled: its UNet is told the guidance (time_cond_proj_dim is "
            f"{config.time_cond_proj_dim}), a teacher must be one that is not"
        )


def diffusion_of(model: LoadedModel, horizon: int) -> Diffusion:
    """The teacher's process up to the horizon. Raises TurbopocketError for a horizon that it does not have, and for a
    noise schedule that a first and a last beta do not say.
    """
    spec = noise_schedule(model)
    if spec.rescale_betas_zero_snr:
        raise TurbopocketError(
            "rescale_betas_zero_snr = True: cut at a horizon, this teacher's noise schedule is none that a first and a "
            "last beta say"
        )
    if not LEAST_HORIZON <= horizon <= spec.num_train_timesteps:
        raise TurbopocketError(
            f"horizon {horizon}: this teacher has {spec.num_train_timesteps} timesteps, "
            f"at least {LEAST_HORIZON} are needed"
        )
    return Diffusion(torch.from_numpy(alphas_cumprod(spec))[:horizon], spec.prediction_type)


def noise_schedule(model: LoadedModel) -> SamplerSpec:
    """What the teacher was trained on, whichever sampler its folder names: a student's is DDIM."""
    return SamplerSpec.from_scheduler_config(config_for(model.scheduler_config, "ddim"), 1, 1.0)


def beta_end(spec: SamplerSpec, horizon: int) -> float:
    """The last beta of the schedule's first `horizon` timesteps, which are a schedule of the same kind."""
    share = (horizon - 1) / (spec.num_train_timesteps - 1)
    if spec.beta_schedule == "linear":
        return spec.beta_start + share * (spec.beta_end - spec.beta_start)
    first, last = spec.beta_start**0.5, spec.beta_end**0.5
    return (first + share * (last - first)) ** 2
