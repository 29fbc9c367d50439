# SPDX-License-Identifier: Apache-2.0
"""Latents as the sampler has them, and z as the VAE has it: the two ways between them."""

import numpy as np
from numpy.typing import NDArray

from .manifest import ImageSpec

Array = NDArray[np.float32]


def to_vae(image: ImageSpec, latents: Array) -> Array:
    """z [N, C, h, w] that a VAE decodes: latents * std / scaling factor + mean, without mean and std where none are."""
    scale = np.float32(image.vae_scaling_factor)
    if image.latents_mean is None or image.latents_std is None:
        return latents / scale
    return latents * _by_channel(image.latents_std) / scale + _by_channel(image.latents_mean)


def from_vae(image: ImageSpec, z: Array) -> Array:
    """The latents [N, C, h, w] of what a VAE encoded: the inverse of `to_vae`."""
    scale = np.float32(image.vae_scaling_factor)
    if image.latents_mean is None or image.latents_std is None:
        return z * scale
    return (z - _by_channel(image.latents_mean)) * scale / _by_channel(image.latents_std)


def _by_channel(values: list[float]) -> Array:
    return np.array(values, dtype=np.float32).reshape(1, -1, 1, 1)
