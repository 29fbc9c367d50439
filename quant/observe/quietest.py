# SPDX-License-Identifier: Apache-2.0
"""How little a layer may give: a step that suits its loud outputs can round a quiet one away."""

import math

from torch import Tensor, nn

from ...ground.names import CallPlace
from .base import Observation


class QuietestOutput(Observation[float]):
    """E[y²] of the item of a batch for which it is least, over all calls."""

    def begin(self, layer: nn.Module) -> None:
        self.power = math.inf

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        if y.numel():
            self.power = min(self.power, float(y.float().flatten(1).square().mean(1).min()))

    def value(self) -> float:
        return self.power
