# SPDX-License-Identifier: Apache-2.0
"""Structural similarity as the square of a length, so that gradients tell what each layer does to it.

SSIM (Wang et al. 2004, equation 13) of a picture p and p + e has no first derivative at e = 0. To second order, summed
over windows with weights w, mean μ and variance σ² of p:

    1 - SSIM = (w·e)² / (2 μ² + C1) + Σ_k w_k (e_k - w·e)² / (2 σ² + C2)

which is ||B e||² for a B that p alone decides. What a layer does is then measured without a difference of two numbers
near 1, in which float32 cannot tell most layers apart. N pictures, H W their sides, L windows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ground.errors import TurbopocketError
from ...runtimes.compare.metrics import SSIM_K1, SSIM_K2, SSIM_WINDOW, ssim_weights

MOST_WINDOWS = 4096
"""Of each channel of a picture: in larger ones every second or later window each way is taken."""


class SsimForm:
    """B for pictures [N, 3, H, W] in 0..1."""

    def __init__(self, pictures: Tensor) -> None:
        sides = pictures.shape[2:]
        if min(sides) < SSIM_WINDOW:
            raise TurbopocketError(f"SSIM needs sides of {SSIM_WINDOW} pixels or more, found {tuple(sides)}")
        windows = math.prod(side - SSIM_WINDOW + 1 for side in sides)
        self.stride = math.ceil(math.sqrt(windows / MOST_WINDOWS))
        weights = torch.from_numpy(ssim_weights())
        self.weights_K1 = torch.outer(weights, weights).flatten()[:, None]
        seen_RKL = self._windows(pictures.to(torch.float64))
        mean_R1L = (self.weights_K1 * seen_RKL).sum(1, keepdim=True)
        variance_R1L = (self.weights_K1 * (seen_RKL - mean_R1L).square()).sum(1, keepdim=True)
        self.of_mean = (2 * mean_R1L.square() + SSIM_K1**2).rsqrt().float()
        self.of_rest = (self.weights_K1 / (2 * variance_R1L + SSIM_K2**2)).sqrt().float()
        self.weights_K1 = self.weights_K1.float()
        self.pictures = len(pictures)

    @property
    def energy(self) -> float:
        """What squared lengths are divided by to be means of 1 - SSIM over windows, channels and pictures, times N."""
        return float(self.of_mean.numel())

    def __call__(self, pictures: Tensor, rows: slice = slice(None)) -> Tensor:
        """B p [N, …] of the pictures in these rows."""
        which = torch.arange(self.pictures)[rows]
        of_mean, of_rest = (
            each.unflatten(0, (self.pictures, 3))[which].flatten(0, 1) for each in (self.of_mean, self.of_rest)
        )
        seen_RKL = self._windows(pictures)
        mean_R1L = (self.weights_K1 * seen_RKL).sum(1, keepdim=True)
        both = torch.cat([of_mean * mean_R1L, of_rest * (seen_RKL - mean_R1L)], dim=1)
        return both.unflatten(0, (len(which), 3))

    def _windows(self, pictures: Tensor) -> Tensor:
        """[3N, K, L]: the pixels of each window of each channel."""
        return F.unfold(pictures.flatten(0, 1)[:, None], SSIM_WINDOW, stride=self.stride)
