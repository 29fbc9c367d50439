# SPDX-License-Identifier: Apache-2.0
"""Latents as the sampler has them, and z as the VAE has it: the two ways between them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError
from ..manifest import ImageSpec
from ..pipeline import Encoder
from .sampler import NoiseSource

Array = NDArray[np.float32]

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""diffusers' limits of what an encoder says."""


def encoded_mean(encoder: Encoder, outputs: Mapping[str, NDArray[Any]]) -> Array:
    """The middle [N, C, h, w] of the z that an encoder's outputs stand for."""
    return _parameters(encoder, outputs)[0]


def encoded(encoder: Encoder, outputs: Mapping[str, NDArray[Any]], noise: NoiseSource) -> Array:
    """One z [N, C, h, w] of those that an encoder's outputs stand for; draws noise where they have a variance.

    Raises TurbopocketError for outputs of other names.
    """
    mean, log_variance = _parameters(encoder, outputs)
    if log_variance is None:
        return mean
    low, high = map(np.float32, LOG_VARIANCE_RANGE)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, low, high))
    return mean + deviation * noise(mean.shape)


def _parameters(encoder: Encoder, outputs: Mapping[str, NDArray[Any]]) -> tuple[Array, Array | None]:
    if encoder.output not in outputs:
        raise TurbopocketError(f"{encoder.component} has no output {encoder.output}: it has {', '.join(outputs)}")
    given = outputs[encoder.output].astype(np.float32)
    if encoder.gives == "latents":
        return given, None
    mean, log_variance = np.split(given, 2, axis=1)
    return mean, log_variance


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
