# SPDX-License-Identifier: Apache-2.0
"""How activations are rounded, as a value: `a8-dynamic`, `a8-static`, `a8-step`; and the qparams of one that is."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

from ..ground.errors import TurbopocketError

_NAME = re.compile(r"a(4|6|8)-(dynamic|static|step)")
Scales = Literal["dynamic", "static", "step"]
_SCALES: tuple[Scales, ...] = get_args(Scales)
_SMALLEST_SCALE = 2.0**-23
"""What a tensor of nothing but zeros is rounded with; float32's epsilon, as in PyTorch's observers."""


@dataclass(frozen=True)
class QParams:
    """Affine quantization of a tensor to signed integers of `bits` bits: real = (code - zero_point) * scale."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def lowest(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1

    @classmethod
    def over(cls, least: float, greatest: float, bits: int = 8) -> Self:
        """From least to greatest, and 0 exact: a code of its own, even where the range does not hold it."""
        least, greatest = min(least, 0.0), max(greatest, 0.0)
        scale = max((greatest - least) / (2**bits - 1), _SMALLEST_SCALE)
        return cls(scale, -(2 ** (bits - 1)) - round(least / scale), bits)


@dataclass(frozen=True)
class ActivationFormat:
    """Activations as integers of `bits` bits, asymmetric.

    `scales` says when scale and zero point are chosen. `dynamic`: while the layer runs, one of each for every row of
    features of a Linear (of a 1x1 Conv2d: for every pixel) and for every picture of a larger Conv2d. `static`: by
    calibration, one of each for the whole tensor at all timesteps. `step`: by calibration, one of each for every
    timestep that the shipped schedule walks through, for calls with a prompt and without (finite set calibration:
    Huang et al., TFMQ-DM, arXiv 2311.16503, section 4.3); of a component that has no timestep, as `static`.
    """

    bits: int
    scales: Scales

    syntax: ClassVar[str] = "a8-dynamic, a8-static, a8-step (also of 4 and 6 bits, which no target runs)"

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise TurbopocketError(f"a rounded activation has 4, 6 or 8 bits, not {self.bits}")

    def __str__(self) -> str:
        return f"a{self.bits}-{self.scales}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The format of that name, the inverse of `str`; None when it is not one."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        return cls(int(match[1]), next(each for each in _SCALES if each == match[2]))


A8_DYNAMIC, A8_STATIC, A8_STEP = (ActivationFormat(8, scales) for scales in _SCALES)
