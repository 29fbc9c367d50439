# SPDX-License-Identifier: Apache-2.0
"""The noise arithmetic of distillation: x_t = signal(t) * x_0 + spread(t) * eps, with signal² + spread² = 1.

Shape suffixes: N samples; latents are (N, ...). Timesteps are whole numbers per sample, `CLEAN` = no noise.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .steps import CLEAN

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Diffusion:
    """The forward process a model was trained on.

    Attributes:
        alphas_cumprod: (T,) share of signal variance at each training timestep.
        prediction: what the model's output means.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def shares(self, timesteps_N: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and spread at each sample's timestep, shaped to multiply `like`."""
        table = self.alphas_cumprod.to(like.device)
        alpha = torch.where(timesteps_N == CLEAN, torch.ones(()).to(table), table[timesteps_N.clamp(min=0)])
        alpha = alpha.reshape(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def signal_to_noise(self, timesteps_N: Tensor) -> Tensor:
        """(N,) ratio of signal to noise variance."""
        alpha = self.alphas_cumprod.to(timesteps_N.device)[timesteps_N]
        return alpha / (1 - alpha)

    def clean_and_noise(self, x_t: Tensor, output: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Tensor]:
        """The (x_0, eps) that the model's output at x_t stands for."""
        signal, spread = self.shares(timesteps_N, x_t)
        if self.prediction == "epsilon":
            return (x_t - spread * output) / signal, output
        return signal * x_t - spread * output, signal * output + spread * x_t

    def mixed(self, x_0: Tensor, eps: Tensor, timesteps_N: Tensor) -> Tensor:
        """x_t of a clean sample and a noise: the forward process, and with predictions a DDIM step (eta 0)."""
        signal, spread = self.shares(timesteps_N, x_0)
        return signal * x_0 + spread * eps

    def diffused(self, x_s: Tensor, from_N: Tensor, to_N: Tensor, noise: Tensor) -> Tensor:
        """x_t for t >= s by the forward process: x_s shrunk, and as much fresh noise as is then missing."""
        signal_s, spread_s = self.shares(from_N, x_s)
        signal_t, spread_t = self.shares(to_N, x_s)
        kept = signal_t / signal_s
        return kept * x_s + (spread_t.square() - (kept * spread_s).square()).clamp(min=0).sqrt() * noise
