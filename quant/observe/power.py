# SPDX-License-Identifier: Apache-2.0
"""How strongly each column of a layer's weight is driven."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ground.names import CallPlace
from .base import Observation
from .vectors import InputView


class InputPower(Observation[Tensor]):
    """E[x²] of each column over all input vectors, float32 [K]: the diagonal of `SecondMoment`, for K numbers, not K².

    A convolution's padding counts.
    """

    def begin(self, layer: nn.Module) -> None:
        self.view = InputView.of(layer)
        self.sum_K, self.count = torch.zeros(self.view.columns, dtype=torch.float64), 0

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        power_K, count = self.view.powers(x)
        self.count += count
        with torch.inference_mode(False), torch.no_grad():
            self.sum_K += power_K

    def value(self) -> Tensor:
        return (self.sum_K / max(1, self.count)).to(torch.float32)

    @classmethod
    def packed(cls, value: Tensor) -> dict[str, Tensor]:
        return {"value": value}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"]
