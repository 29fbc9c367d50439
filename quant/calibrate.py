# SPDX-License-Identifier: Apache-2.0
"""What each layer sees while a model runs: its ranges, and the second moment of its inputs in matrix-view column order.

B batch, I input channels, H W input size, Y X output size, K columns of the matrix view, N input vectors.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError
from .layers import compressible_layers, weight_of
from .ranges import Ranges

# Floats of input vectors in one pass: a 512 x 512 convolution unfolded whole would be gigabytes.
CHUNK_FLOATS = 2**23


@dataclass(frozen=True)
class LayerStats:
    """`hessian_KK` = E[x xᵀ] (float32) over the `count` input vectors one layer saw.

    For n = count vectors: Σ ||W x||² = n * tr(W H Wᵀ), with W the matrix view of the weight.
    """

    hessian_KK: Tensor
    count: int
    ranges: Ranges


def ranges_of(stats: Mapping[str, LayerStats]) -> dict[str, Ranges]:
    """The ranges of each layer."""
    return {name: layer.ranges for name, layer in stats.items()}


def calibrate(
    modules: Mapping[str, nn.Module], run: Callable[[], object], only: Collection[str] | None = None
) -> dict[str, LayerStats]:
    """The statistics of every compressible layer of the components that `run()` put to use, first to run first.

    Sums are kept in float64, K² * 8 bytes per layer. A layer that did not run, or is not among `only`, is not in the
    result.
    TurbopocketError naming the layer when an input is NaN or infinite.
    """
    moments = {
        name: _Moments(name, layer)
        for component, module in modules.items()
        for name, layer in compressible_layers(component, module).items()
        if only is None or name in only
    }
    order: dict[str, None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, moment in moments.items():

            def observe(*call: Any, name: str = name, moment: _Moments = moment) -> None:
                order.setdefault(name)
                moment.observe(*call)

            hooks.callback(moment.layer.register_forward_hook(observe).remove)
        run()
    stats = {name: moments[name].stats() for name in order}
    return {name: layer_stats for name, layer_stats in stats.items() if layer_stats is not None}


class _Moments:
    """The running sum of x xᵀ of one layer.

    Input vectors wait until there are as many as columns: one large product then costs less than many sums of K².
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.columns = weight_of(name, layer)[0].numel()
        self.sum_KK: Tensor | None = None
        self.waiting: list[Tensor] = []
        self.waiting_rows = 0
        self.count = 0
        self.input_range, self.output_range = _NOTHING, _NOTHING
        self.quietest_output_power = math.inf

    def observe(self, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Adds the input and the range of one call."""
        x = inputs[0].detach().to(device="cpu", dtype=torch.float32)
        for what, values in (("input", x), ("output", output)):
            if not torch.isfinite(values).all():
                raise TurbopocketError(f"{self.name}: an {what} is NaN or infinite while calibrating")
        self.input_range, self.output_range = _widened(self.input_range, x), _widened(self.output_range, output)
        if output.numel():
            power = float(output.detach().float().flatten(1).square().mean(1).min())
            self.quietest_output_power = min(self.quietest_output_power, power)
        for x_NK in input_vectors(self.layer, x, self.columns):
            self.waiting.append(x_NK.clone())  # the model may write into its tensors before they are summed
            self.waiting_rows += len(x_NK)
            if self.waiting_rows >= self.columns:
                self._sum_waiting()

    def _sum_waiting(self) -> None:
        # The model may run in inference mode, but the sum outlives it and must stay an ordinary tensor.
        with torch.inference_mode(False), torch.no_grad():
            if self.sum_KK is None:
                self.sum_KK = torch.zeros(self.columns, self.columns, dtype=torch.float64)
            x_NK = torch.cat(self.waiting)
            self.sum_KK += x_NK.T @ x_NK
        self.count += self.waiting_rows
        self.waiting, self.waiting_rows = [], 0

    def stats(self) -> LayerStats | None:
        """The mean so far, None if the layer never ran; lets go of the sum."""
        if self.waiting:
            self._sum_waiting()
        if self.sum_KK is None:
            return None
        hessian_KK = (self.sum_KK / self.count).to(torch.float32)
        self.sum_KK = None
        powers = float(hessian_KK.diagonal().mean()), self.quietest_output_power
        return LayerStats(hessian_KK, self.count, Ranges(self.input_range, self.output_range, *powers))


_NOTHING = (math.inf, -math.inf)


def _widened(seen: tuple[float, float], values: Tensor) -> tuple[float, float]:
    if not values.numel():
        return seen
    least, greatest = values.detach().aminmax()
    return min(seen[0], float(least)), max(seen[1], float(greatest))


def input_vectors(layer: nn.Module, x: Tensor, columns: int) -> Iterator[Tensor]:
    """The vectors [N, K] that the matrix view of the layer's weight multiplies, a chunk at a time."""
    rows = max(1, CHUNK_FLOATS // columns)
    if not isinstance(layer, nn.Conv2d):
        yield from x.reshape(-1, columns).split(rows)
        return
    patches_BYXhwI = _patches(layer, x if x.ndim == 4 else x.unsqueeze(0))
    lines = max(1, rows // patches_BYXhwI.shape[2])
    for patches_YXhwI in patches_BYXhwI:
        for strip in patches_YXhwI.split(lines):
            yield strip.reshape(-1, columns)


def _patches(layer: nn.Conv2d, x_BIHW: Tensor) -> Tensor:
    """A view [B, Y, X, kh, kw, I] of the padded input: nothing is unfolded before it is copied."""
    # PyTorch's own resolution of padding="same", numbers and pairs: left, right, top, bottom.
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x_BHWI = nn.functional.pad(x_BIHW, padding, mode=mode).permute(0, 2, 3, 1).contiguous()
    batch, height, width, channels = x_BHWI.shape
    (kh, kw), (stride_y, stride_x), (step_y, step_x) = layer.kernel_size, layer.stride, layer.dilation
    out_y = (height - step_y * (kh - 1) - 1) // stride_y + 1
    out_x = (width - step_x * (kw - 1) - 1) // stride_x + 1
    image, line, pixel, _ = x_BHWI.stride()
    return x_BHWI.as_strided(
        (batch, out_y, out_x, kh, kw, channels),
        (image, line * stride_y, pixel * stride_x, line * step_y, pixel * step_x, 1),
    )
