# SPDX-License-Identifier: Apache-2.0
"""What every weight format promises, and the matrix view that all of them and the Hessians share.

O outputs, I inputs, K columns of the matrix view, kh kw kernel height and width.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from ..fit.base import Fit
from ..fit.grids import VectorCodes
from ..fit.hessian import Hessian
from ..names import FormatName

Shape = tuple[int, ...]


class PartSpec(NamedTuple):
    """One stored tensor of a compressed weight, known from the weight's shape alone."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CompressedTensor:
    """One weight as stored: its format, its original shape and its named parts."""

    format: "LayerFormat"
    shape: Shape
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its own: of all parts but the shared ones."""
        own = (part for name, part in self.parts.items() if name not in self.format.shared_parts)
        return sum(part.numel() * part.element_size() for part in own)

    def require_promised_parts(self) -> None:
        """TurbopocketError when the parts are not those its format stores for its shape."""
        promised = self.format.part_specs(self.shape)
        found = {name: PartSpec(part.dtype, tuple(part.shape)) for name, part in self.parts.items()}
        if found != promised:
            raise TurbopocketError(f"{self.format} of shape {list(self.shape)} stores {promised}, found {found}")


class LayerFormat(FormatName):
    """How one weight is stored: a value whose name is `str(format)` and whose size follows from the shape.

    A format says which parts it stores (`part_specs`) and how to fill and read them (`encode`, `decode`);
    checks, sizes and refusals are the same for all and live here.
    """

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Parts that are equal in all layers of a component in this format, and stored once for them."""
        return ()

    @property
    @abstractmethod
    def weight_bits(self) -> float:
        """Bits per weight of the codes alone, scales not counted."""

    @abstractmethod
    def fits(self, shape: Shape) -> str | None:
        """None when a weight of this shape can be stored, else the reason with its numbers."""

    @abstractmethod
    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        """Name, type and shape of everything that is stored for a weight of a shape that fits."""

    @abstractmethod
    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        """The parts of a finite float32 weight whose shape fits."""

    @abstractmethod
    def decode(self, compressed: CompressedTensor) -> Tensor:
        """The stored weight as float32 in its original shape."""

    def vector_codes(self, compressed: CompressedTensor) -> tuple[VectorCodes, ...]:
        """The codebooks whose vectors make the weight, their sum where there are several; none in other formats."""
        return ()

    def with_vector_codes(self, compressed: CompressedTensor, codes: Sequence[VectorCodes]) -> CompressedTensor:
        """The weight with other codes, codebooks and scale in the place of those that `vector_codes` gave."""
        raise TurbopocketError(f"{self} has no codebooks of vectors")

    def nbytes(self, shape: Shape) -> int:
        """Exact stored bytes of a weight of this shape, shared parts aside; TurbopocketError when it does not fit."""
        self._require_fit(shape)
        return sum(spec.nbytes for name, spec in self.part_specs(shape).items() if name not in self.shared_parts)

    def compress(self, weight: Tensor, fit: Fit, hessian: Hessian | None = None) -> CompressedTensor:
        """The weight in this format, values chosen by `fit` (with H = E[x xᵀ] in matrix-view order, [K, K]).

        TurbopocketError when the shape does not fit, when a value is not finite, or when the fit lacks its Hessian.
        """
        shape = tuple(weight.shape)
        self._require_fit(shape)
        bad_values = int((~torch.isfinite(weight)).sum())
        if bad_values:
            raise TurbopocketError(f"{bad_values:,} of {weight.numel():,} weights are NaN or infinite")
        plain = weight.detach().to(device="cpu", dtype=torch.float32)
        return CompressedTensor(self, shape, self.encode(plain, fit, hessian))

    def decompress(self, compressed: CompressedTensor) -> Tensor:
        """float32 in the original shape; TurbopocketError when the parts are not those of this format and shape."""
        self._require_fit(compressed.shape)
        compressed.require_promised_parts()
        return self.decode(compressed)

    def _require_fit(self, shape: Shape) -> None:
        reason = self.fits(shape)
        if reason is not None:
            raise TurbopocketError(reason)


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(O, K) of the matrix view of a weight of this shape."""
    return shape[0], math.prod(shape[1:])


def matrix_view(weight: Tensor) -> Tensor:
    """[O, K]: a Linear as it is, a Conv2d with its columns in (kh, kw, I) order.

    That order makes g neighbouring columns g input channels at one tap, so a group never mixes taps.
    """
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def from_matrix_view(weight_OK: Tensor, shape: Shape) -> Tensor:
    """The weight in its original shape, contiguous: the inverse of `matrix_view`."""
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        return weight_OK.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()
    return weight_OK.reshape(shape)
