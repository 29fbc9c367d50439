# SPDX-License-Identifier: Apache-2.0
"""Ops on the last two axes as pictures: resizing, pooling, pixels into channels and back."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .arithmetic import Arithmetic
from .registry import op, require


@op("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(
    run: Arithmetic, x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0
) -> Tensor:
    factors = [int(scale_factor_height), int(scale_factor_width)]
    whole = factors == [scale_factor_height, scale_factor_width] and min(factors) > 0
    require(
        whole and x.dim() >= 3, f"factors {scale_factor_height} and {scale_factor_width}: only whole ones are known"
    )
    run.expect([*x.shape[:-2], x.shape[-2] * factors[0], x.shape[-1] * factors[1]])
    return x.repeat_interleave(factors[0], -2).repeat_interleave(factors[1], -1)


@op("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(run: Arithmetic, x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    height, width = target_size_height / x.shape[-2], target_size_width / x.shape[-1]
    return upsample_nearest_neighbor(run, x, height, width)  # type: ignore[return-value]


@op("upsample_bilinear")
def upsample_bilinear(
    run: Arithmetic,
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    size = [int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)]
    known = half_pixel_centers is None or half_pixel_centers != align_corners
    require(known, f"align_corners {align_corners} with half_pixel_centers {half_pixel_centers}")
    require(half_pixel_centers is not None or align_corners, "neither corners nor pixel centers aligned")
    return _bilinear(run, x, size, align_corners)


@op("resize_bilinear")
def resize_bilinear(
    run: Arithmetic, x: Tensor, target_size_height: int, target_size_width: int, sampling_mode: str = "DEFAULT"
) -> Tensor:
    modes = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}
    require(sampling_mode in modes, f"sampling_mode {sampling_mode!r}: known are {', '.join(modes)}")
    return _bilinear(run, x, [target_size_height, target_size_width], modes[sampling_mode])


@op("pixel_shuffle", moves=True)
def pixel_shuffle(run: Arithmetic, x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", moves=True)
def pixel_unshuffle(run: Arithmetic, x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@op("max_pool")
def max_pool(
    run: Arithmetic,
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    windows, _ = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, float("-inf"))
    return windows.amax(_last(kernel_sizes))


@op("avg_pool")
def avg_pool(
    run: Arithmetic,
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    windows, inside = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    total = run.sum(windows, [axis % windows.dim() for axis in _last(kernel_sizes)], keep=False)
    return total / (inside.sum(_last(kernel_sizes)) if exclude_padding_from_average else math.prod(kernel_sizes))


def _bilinear(run: Arithmetic, x: Tensor, size: list[int], align_corners: bool) -> Tensor:
    require(x.dim() == 4 and min(size) > 0, f"{list(x.shape)} to {size}")
    run.expect([*x.shape[:2], *size])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def _last(kernel_sizes: list[int]) -> list[int]:
    return list(range(-len(kernel_sizes), 0))


def _windows(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None,
    pad_type: str,
    pad: list[int] | None,
    ceil_mode: bool,
    filler: float,
) -> tuple[Tensor, Tensor]:
    """Windows [N, C, *out, *kernel] of the padded x, and of 1 inside x and 0 in the padding."""
    rank = len(kernel_sizes)
    steps = [1] * rank if strides is None else strides
    amounts = [0] * 2 * rank if pad is None or pad_type == "valid" else pad
    require(pad_type in ("valid", "custom") and not ceil_mode, f"pad_type {pad_type!r}, ceil_mode {ceil_mode}")
    require(x.dim() == rank + 2 and len(steps) == rank and len(amounts) == 2 * rank, f"kernel {kernel_sizes}")
    require(min(kernel_sizes) > 0 and min(steps) > 0, f"kernel {kernel_sizes}, strides {steps}")
    require(all(0 <= amount < max(kernel_sizes) for amount in amounts), f"pad {amounts} for kernel {kernel_sizes}")
    around = [amount for axis in reversed(range(rank)) for amount in amounts[2 * axis : 2 * axis + 2]]
    padded, inside = F.pad(x, around, value=filler), F.pad(torch.ones_like(x), around)
    for axis, (kernel, step) in enumerate(zip(kernel_sizes, steps, strict=True)):
        padded, inside = padded.unfold(2 + axis, kernel, step), inside.unfold(2 + axis, kernel, step)
    return padded, inside
