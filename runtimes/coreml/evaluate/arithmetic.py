# SPDX-License-Identifier: Apache-2.0
"""How one op computes: in fp32, or as an accelerator with fp16 accumulators might, with bounds on partial sums.

Every floating-point value is a float32 tensor; a value of type fp16 is one whose numbers fp16 can hold.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....ground.errors import TurbopocketError
from ..file.dtypes import TensorType

BLOCK = 64
"""Products or terms that `narrow` arithmetic adds exactly before it rounds."""


def to_fp16(x: Tensor) -> Tensor:
    """Every number rounded to the nearest that fp16 holds; beyond 65504 infinite."""
    return x.half().float()


@dataclass
class Arithmetic:
    """Arithmetic of one op.

    `narrow`: sums and what comes between the steps of a compound op are rounded to fp16, sums in blocks of 64.
    `record`: `bound` becomes the largest sum of magnitudes of terms, which no partial sum in any order can pass.
    `declared` are the types of the op's results; `from_end`: whether indices below zero count from the end, as
    they did before iOS17.
    """

    declared: Sequence[TensorType]
    from_end: bool = False
    narrow: bool = False
    record: bool = False
    bound: float | None = None

    def step(self, x: Tensor) -> Tensor:
        """`x` as it is held between two steps of a compound op."""
        return to_fp16(x) if self.narrow else x

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y, broadcast over leading axes."""
        if self.record:
            self._saw(torch.matmul(x.abs(), y.abs()))
        if not self.narrow:
            return torch.matmul(x, y)
        total: Tensor | None = None
        for start in range(0, x.shape[-1], BLOCK):
            part = torch.matmul(x[..., start : start + BLOCK], y[..., start : start + BLOCK, :])
            total = self._add(total, part)
        return torch.matmul(x, y) if total is None else total

    def conv(self, x: Tensor, weight: Tensor, strides: list[int], dilations: list[int], groups: int) -> Tensor:
        """Convolution [N, C, *spatial] * [O, C / groups, *kernel] without padding."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        if self.record:
            self._saw(convolve(x.abs(), weight.abs(), None, strides, 0, dilations, groups))
        if not self.narrow:
            return convolve(x, weight, None, strides, 0, dilations, groups)
        N, C, *spatial = x.shape
        kernel = weight.shape[2:]
        sizes = [
            (s - d * (k - 1) - 1) // stride + 1
            for s, d, k, stride in zip(spatial, dilations, kernel, strides, strict=True)
        ]
        grouped = x.reshape(N, groups, C // groups, *spatial)
        total: Tensor | None = None
        for start in range(0, C // groups, BLOCK):
            channels = grouped[:, :, start : start + BLOCK].reshape(N, -1, *spatial)
            for tap in itertools.product(*map(range, kernel)):
                window: list[Any] = [
                    slice(t * d, t * d + (size - 1) * stride + 1, stride)
                    for t, d, size, stride in zip(tap, dilations, sizes, strides, strict=True)
                ]
                taps: list[Any] = [slice(t, t + 1) for t in tap]
                part = weight[:, start : start + BLOCK][(..., *taps)]
                total = self._add(total, convolve(channels[(..., *window)], part, groups=groups))
        if total is None:
            raise ValueError("a convolution of no channels")
        return total

    def sum(self, x: Tensor, axes: Sequence[int], keep: bool = True, share: float = 1.0) -> Tensor:
        """Sum over `axes` of x * share (a mean's share is 1 / count, which is applied before adding).

        `narrow` adds as a tree of nodes with 64 terms, each node rounded.
        """
        if not axes:
            return x
        if self.record:
            self._saw(x.abs().sum(tuple(axes)))
        if not self.narrow:
            total = x.sum(tuple(axes), keepdim=keep)
            return total if share == 1 else total * share
        kept = [axis for axis in range(x.dim()) if axis not in axes]
        terms = x.permute(*kept, *axes).reshape([x.shape[axis] for axis in kept] + [-1]) * share
        first = True
        while first or terms.shape[-1] > 1:
            terms = F.pad(terms, (0, -terms.shape[-1] % BLOCK))
            terms = to_fp16(terms.unflatten(-1, (-1, BLOCK)).sum(-1))
            first = False
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return terms.reshape(shape if keep else [x.shape[axis] for axis in kept])

    def mean(self, x: Tensor, axes: Sequence[int], keep: bool = True) -> Tensor:
        """Mean over `axes`."""
        count = 1
        for axis in axes:
            count *= x.shape[axis]
        return self.sum(x, axes, keep, 1 / max(count, 1))

    def expect(self, shape: Sequence[int], result: int = 0) -> None:
        """Returns when the result is declared with this shape; ops call it before they allocate more than they got."""
        if list(shape) != list(self.declared[result].shape):
            raise TurbopocketError(f"the result is {list(shape)}, declared {self.declared[result]}")

    def _add(self, total: Tensor | None, part: Tensor) -> Tensor:
        return to_fp16(part) if total is None else to_fp16(total + to_fp16(part))

    def _saw(self, sums: Any) -> None:
        if sums.numel():
            self.bound = max(self.bound or 0.0, float(sums.max()))
