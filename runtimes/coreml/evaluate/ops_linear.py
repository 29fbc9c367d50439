# SPDX-License-Identifier: Apache-2.0
"""Ops that multiply and add: linear, matmul, convolutions, attention."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arithmetic import Arithmetic
from .registry import op, require


@op("linear")
def linear(run: Arithmetic, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = run.matmul(x, weight.T)
    return product if bias is None else run.step(product) + bias


@op("matmul")
def matmul(run: Arithmetic, x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    require(x.dim() > 1 and y.dim() > 1, f"matrices {list(x.shape)} and {list(y.shape)}, which need two axes")
    left, right = (x.mT if transpose_x else x), (y.mT if transpose_y else y)
    require(left.shape[-1] == right.shape[-2], f"{list(left.shape)} @ {list(right.shape)}")
    run.expect([*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1]])
    return run.matmul(left, right)


@op("einsum")
def einsum(run: Arithmetic, values: list[Tensor], equation: str) -> Tensor:
    """The two forms that converters write: a sum over one shared axis, as a batched matrix product."""
    require(equation in _EINSUMS and len(values) == 2, f"equation {equation!r}: known are {', '.join(_EINSUMS)}")
    x, y = values
    require(x.dim() == len(equation.split(",")[0]), f"{list(x.shape)} for {equation}")
    require(y.dim() == len(equation.split(",")[1].split("->")[0]), f"{list(y.shape)} for {equation}")
    if equation == "nchw,nwhu->nchu":
        return run.matmul(x.transpose(1, 2), y.transpose(1, 2)).transpose(1, 2)
    return run.matmul(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)


_EINSUMS = ("nchw,nwhu->nchu", "chw,whr->chr")


@op("conv")
def conv(
    run: Arithmetic,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    rank = _spatial_rank(x, weight)
    strides, dilations = _per_axis(strides, rank, "strides"), _per_axis(dilations, rank, "dilations")
    kernel = list(weight.shape[2:])
    pairs = _padding(pad_type, pad, list(x.shape[2:]), kernel, strides, dilations)
    require(
        groups > 0 and weight.shape[0] % groups == 0 and x.shape[1] == weight.shape[1] * groups,
        f"{x.shape[1]} channels for weights {list(weight.shape)} in {groups} groups",
    )
    padded = [size + low + high for size, (low, high) in zip(x.shape[2:], pairs, strict=True)]
    sizes = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, dilation, k, stride in zip(padded, dilations, kernel, strides, strict=True)
    ]
    run.expect([x.shape[0], weight.shape[0], *sizes])
    return _biased(run, run.conv(_pad(x, pairs), weight, strides, dilations, groups), bias)


@op("conv_transpose")
def conv_transpose(
    run: Arithmetic,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """As the convolution it is: zeros between the numbers, the kernel turned round."""
    rank = _spatial_rank(x, weight)
    strides, dilations = _per_axis(strides, rank, "strides"), _per_axis(dilations, rank, "dilations")
    require(pad_type in ("valid", "custom"), f"pad_type {pad_type!r}: known are valid, custom")
    pairs = _pairs(pad, rank) if pad_type == "custom" else [(0, 0)] * rank
    N, C, *spatial = x.shape
    require(groups > 0 and C % groups == 0 and weight.shape[0] == C, f"{C} channels for {list(weight.shape)}")
    reach = [dilation * (k - 1) for dilation, k in zip(dilations, weight.shape[2:], strict=True)]
    full = [(size - 1) * stride + 1 + span for size, stride, span in zip(spatial, strides, reach, strict=True)]
    # without an asked shape the padding says it; with one, what is missing is added at the far end
    asked = output_shape[2:] if output_shape else None
    sizes = asked or [size - low - high for size, (low, high) in zip(full, pairs, strict=True)]
    extra = [size - (whole - low - high) for size, whole, (low, high) in zip(sizes, full, pairs, strict=True)]
    require(all(0 <= more < stride for more, stride in zip(extra, strides, strict=True)), f"a result of {sizes}")
    run.expect([N, weight.shape[1] * groups, *sizes])
    spread = x.new_zeros(N, C, *[(size - 1) * stride + 1 for size, stride in zip(spatial, strides, strict=True)])
    places: list[Any] = [slice(None, None, stride) for stride in strides]
    spread[(..., *places)] = x
    around = [(span - low, span - high + more) for span, (low, high), more in zip(reach, pairs, extra, strict=True)]
    turned = weight.flip(list(range(2, 2 + rank))).unflatten(0, (groups, C // groups)).transpose(1, 2).flatten(0, 1)
    return _biased(run, run.conv(_pad(spread, around), turned, [1] * rank, dilations, groups), bias)


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(
    run: Arithmetic, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    require(query.shape[:-2] == key.shape[:-2] == value.shape[:-2], f"{list(query.shape)} and {list(key.shape)}")
    require(query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2], f"{list(key.shape)} keys")
    if not (run.narrow or run.record):
        return F.scaled_dot_product_attention(query, key, value, attn_mask)
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    for head in range(math.prod(query.shape[:-2])):
        parts = [tensor.reshape(-1, *tensor.shape[-2:])[head] for tensor in (query, key, value)]
        head_mask = None if mask is None else mask.reshape(-1, *mask.shape[-2:])[head]
        out.view(-1, *out.shape[-2:])[head] = _attention(run, parts[0], parts[1], parts[2], head_mask)
    return out


def _attention(run: Arithmetic, query_LE: Tensor, key_SE: Tensor, value_SV: Tensor, mask_LS: Tensor | None) -> Tensor:
    scores_LS = run.step(run.matmul(run.step(query_LE / math.sqrt(query_LE.shape[-1])), key_SE.T))
    if mask_LS is not None and mask_LS.dtype == torch.bool:
        scores_LS = scores_LS.masked_fill(~mask_LS, -math.inf)
    elif mask_LS is not None:
        scores_LS = run.step(scores_LS + mask_LS)
    return run.matmul(run.step(softmax_along(run, scores_LS, -1)), value_SV)


def softmax_along(run: Arithmetic, x: Tensor, axis: int) -> Tensor:
    """exp(x - max) over its sum along `axis`."""
    if not (run.narrow or run.record):
        return torch.softmax(x, axis)
    powers = run.step(torch.exp(run.step(x - x.amax(axis, keepdim=True))))
    return powers / run.sum(powers, [axis % x.dim()])


def _biased(run: Arithmetic, x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else run.step(x) + bias.reshape(-1, *[1] * (x.dim() - 2))


def _spatial_rank(x: Tensor, weight: Tensor) -> int:
    require(x.dim() in (3, 4, 5) and weight.dim() == x.dim(), f"{list(x.shape)} and weights {list(weight.shape)}")
    return x.dim() - 2


def _per_axis(values: list[int] | None, rank: int, name: str) -> list[int]:
    values = [1] * rank if values is None else values
    require(len(values) == rank and min(values) > 0, f"{name} {values} for {rank} axes")
    return values


def _pairs(pad: list[int] | None, rank: int) -> list[tuple[int, int]]:
    pad = [0] * 2 * rank if pad is None else pad
    require(len(pad) == 2 * rank and min(pad) >= 0, f"pad {pad} for {rank} axes")
    return list(zip(pad[0::2], pad[1::2], strict=True))


def _padding(
    pad_type: str, pad: list[int] | None, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """(before, after) per axis. `same` keeps ceil(size / stride); the odd zero goes behind, for `same_lower` before."""
    if pad_type == "custom":
        return _pairs(pad, len(sizes))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    require(pad_type in ("same", "same_lower"), f"pad_type {pad_type!r}: known are valid, same, same_lower, custom")
    pairs = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size)
        less = total // 2
        pairs.append((less, total - less) if pad_type == "same" else (total - less, less))
    return pairs


def _pad(x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    flat = [amount for pair in reversed(pairs) for amount in pair]
    return F.pad(x, flat) if any(flat) else x
