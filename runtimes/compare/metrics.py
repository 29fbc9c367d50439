# SPDX-License-Identifier: Apache-2.0
"""How far one array or picture is from another, as single numbers; everything is summed in float64."""

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError

Floats = NDArray[np.float64]
SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def max_abs_error(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """The largest absolute difference of two elements; inf where either is not finite and they differ."""
    difference = _difference(candidate, reference)
    return float(np.abs(difference).max(initial=0.0))


def relative_error(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """||candidate - reference|| / ||reference||: 0 when equal, inf when only the reference is zero."""
    error = float(np.linalg.norm(_difference(candidate, reference)))
    size = float(np.linalg.norm(reference.astype(np.float64)))
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def snr_db(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal-to-noise ratio in dB, the difference being the noise: inf when equal, 20 at a tenth."""
    return _decibels(relative_error(candidate, reference))


def psnr_db(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two pictures (uint8, or floats in 0..1) in dB; inf when equal."""
    difference = _difference(unit_range(candidate), unit_range(reference))
    return _decibels(float(np.sqrt(np.mean(np.square(difference)))))


def ssim(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Structural similarity of two pictures [H, W, C] (uint8, or floats in 0..1), at most 1.

    Wang et al. 2004, equation 13, with their 11 by 11 Gaussian window of sigma 1.5, wherever it fits in
    whole; the mean over positions and channels.
    Raises TurbopocketError when a side is under 11 pixels.
    """
    if min(reference.shape[:2]) < SSIM_WINDOW:
        raise TurbopocketError(f"SSIM needs sides of {SSIM_WINDOW} pixels or more, found {reference.shape[:2]}")
    x, y = unit_range(candidate), unit_range(reference)
    _difference(x, y)
    mean_x, mean_y = _windowed_mean(x), _windowed_mean(y)
    variance_x = _windowed_mean(x * x) - mean_x**2
    variance_y = _windowed_mean(y * y) - mean_y**2
    covariance = _windowed_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def ssim_weights() -> Floats:
    """The window's weights along one side; those of both are their outer product."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    return weights / weights.sum()


def unit_range(picture: NDArray[Any]) -> Floats:
    """The picture as float64 in 0..1: uint8 is divided by 255, floats are taken as they are."""
    return picture / 255.0 if picture.dtype == np.uint8 else picture.astype(np.float64)


def _windowed_mean(picture: Floats) -> Floats:
    """Gaussian-weighted mean around every pixel whose window lies inside: [H, W, C] -> [H-10, W-10, C]."""
    weights = ssim_weights()
    rows = sliding_window_view(picture, SSIM_WINDOW, axis=0) @ weights
    return sliding_window_view(rows, SSIM_WINDOW, axis=1) @ weights


def _difference(candidate: NDArray[Any], reference: NDArray[Any]) -> Floats:
    if candidate.shape != reference.shape:
        raise TurbopocketError(f"shapes {candidate.shape} and {reference.shape} cannot be compared")
    a, b = candidate.astype(np.float64), reference.astype(np.float64)
    # inf - inf and anything with NaN would be NaN, which passes every "error > limit"
    odd = ~(np.isfinite(a) & np.isfinite(b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(odd, np.where(same, 0.0, np.inf), a - b)


def _decibels(ratio: float) -> float:
    return math.inf if ratio == 0 else -20 * math.log10(ratio) if math.isfinite(ratio) else -math.inf
