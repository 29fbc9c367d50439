# SPDX-License-Identifier: Apache-2.0
"""Which layers are fed the same: their second moments are one."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from ...ground.names import CallPlace
from .base import Observation
from .vectors import InputView, digest_of


class InputIdentity(Observation[str]):
    """A name, 32 hexadecimal digits, that layers have in common when they read the same vectors in all their calls."""

    def begin(self, layer: nn.Module) -> None:
        self.calls = repr(InputView.of(layer)).encode()

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        self.calls = sha256(self.calls + digest_of(x)).digest()[:16]

    def value(self) -> str:
        return self.calls.hex()

    @classmethod
    def packed(cls, value: str) -> dict[str, Tensor]:
        return {"value": torch.frombuffer(bytearray.fromhex(value), dtype=torch.uint8)}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> str:
        return bytes(parts["value"].tolist()).hex()
