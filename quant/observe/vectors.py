# SPDX-License-Identifier: Apache-2.0
"""A layer's inputs as the vectors that the matrix view of its weight multiplies.

B batch, I input channels, H W input size, Y X output size, K columns of the matrix view, N input vectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Self

import torch
from torch import Tensor, nn

from ..layers import convolved_size

# Floats of input vectors in one pass: a 512 x 512 convolution unfolded whole would be gigabytes.
CHUNK_FLOATS = 2**23


def digest_of(x: Tensor) -> bytes:
    """16 bytes that tell equal tensors, of equal shape, from all others."""
    digest = sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:16]


@dataclass(frozen=True)
class InputView:
    """How a layer reads its input. Layers of equal views that are given equal tensors multiply equal vectors.

    `padding` is PyTorch's own resolution of padding="same", numbers and pairs: left, right, top, bottom. A Linear has
    no kernel.
    """

    columns: int
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """The view of a Linear, or of a Conv2d with groups = 1."""
        columns = layer.get_parameter("weight")[0].numel()
        if not isinstance(layer, nn.Conv2d):
            return cls(columns)
        kernel, stride, dilation = ((pair[0], pair[1]) for pair in (layer.kernel_size, layer.stride, layer.dilation))
        padding = tuple(layer._reversed_padding_repeated_twice)
        return cls(columns, kernel, stride, dilation, padding, layer.padding_mode)

    def vectors(self, x: Tensor) -> Iterator[Tensor]:
        """The vectors [N, K] of an input, a chunk at a time."""
        rows = max(1, CHUNK_FLOATS // self.columns)
        if self.kernel is None:
            yield from x.reshape(-1, self.columns).split(rows)
            return
        patches_BYXhwI = self._patches(x if x.ndim == 4 else x.unsqueeze(0), self.kernel)
        lines = max(1, rows // patches_BYXhwI.shape[2])
        for patches_YXhwI in patches_BYXhwI:
            for strip in patches_YXhwI.split(lines):
                yield strip.reshape(-1, self.columns)

    def powers(self, x: Tensor) -> tuple[Tensor, int]:
        """Σ x² of each column over the vectors of an input, float64 [K], and how many vectors there are."""
        if self.kernel is None:
            x_NK = x.reshape(-1, self.columns)
            return x_NK.square().sum(0, dtype=torch.float64), len(x_NK)
        power_BIHW = self._padded(x if x.ndim == 4 else x.unsqueeze(0)).square()
        out_y, out_x = self._output_size(power_BIHW, self.kernel)
        (kh, kw), (stride_y, stride_x), (step_y, step_x) = self.kernel, self.stride, self.dilation
        taps: list[list[Tensor]] = [[] for _ in range(kh)]
        for column in range(kw):  # nothing is unfolded: taps of one column read the same pixels of each line
            pixels_BIHX = power_BIHW[..., column * step_x :: stride_x][..., :out_x]
            lines_BIH = pixels_BIHX.sum(-1).double()  # a line is short enough for float32
            for row in range(kh):
                taps[row].append(lines_BIH[..., row * step_y :: stride_y][..., :out_y].sum((0, 2)))
        return torch.cat([tap_I for row in taps for tap_I in row]), len(power_BIHW) * out_y * out_x

    def _patches(self, x_BIHW: Tensor, kernel: tuple[int, int]) -> Tensor:
        """A view [B, Y, X, kh, kw, I] of the padded input: nothing is unfolded before it is copied."""
        padded_BIHW = self._padded(x_BIHW)
        x_BHWI = padded_BIHW.permute(0, 2, 3, 1).contiguous()
        (stride_y, stride_x), (step_y, step_x) = self.stride, self.dilation
        image, line, pixel, _ = x_BHWI.stride()
        return x_BHWI.as_strided(
            (len(x_BHWI), *self._output_size(padded_BIHW, kernel), *kernel, x_BHWI.shape[-1]),
            (image, line * stride_y, pixel * stride_x, line * step_y, pixel * step_x, 1),
        )

    def _padded(self, x_BIHW: Tensor) -> Tensor:
        return nn.functional.pad(
            x_BIHW, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode
        )

    def _output_size(self, padded_BIHW: Tensor, kernel: tuple[int, int]) -> tuple[int, int]:
        """Y and X."""
        sizes = zip(padded_BIHW.shape[2:], kernel, self.stride, self.dilation, strict=True)
        y, x = (convolved_size(size, taps, stride, 0, step) for size, taps, stride, step in sizes)
        return y, x
