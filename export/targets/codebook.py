# SPDX-License-Identifier: Apache-2.0
"""Weights of codebook vectors in the layout that the codebook core reads; see `docs/kernels.md`.

O outputs, M codebooks, P entries of one, D length of a vector, J vectors in a row of the matrix view.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...quant.formats import Additive, Codebook, CompressedTensor
from .layer import LayerForm

CODE_BITS = 8
CODEBOOKS = 1
"""Index of the codebooks among the stored tensors: codes, codebooks, scale."""


class CodebookForm(LayerForm):
    """codes uint8 [O, J, M], the codes of a vector side by side; codebooks fp16 [M, P, D]; scale fp16 [O]."""

    reader: ClassVar[str]
    """Who reads the codes, in messages."""

    @classmethod
    def refusal(cls, format: Additive | Codebook, shape: tuple[int, ...], options: Any) -> str | None:
        if format.bits != CODE_BITS:
            return f"{cls.reader} reads codes of {CODE_BITS} bits, {format} has {format.bits}"
        if isinstance(format, Codebook) and (format.along_outputs or format.rows is not None):
            return f"{cls.reader} reads one codebook of vectors along the inputs, not {format}"
        return None

    @property
    def count(self) -> int:
        """Number of codebooks, M."""
        return self.format.count if isinstance(self.format, Additive) else 1

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of codes, codebooks and scale."""
        outputs, length = self.layer.shape[0], self.format.length
        vectors = math.prod(self.layer.shape[1:]) // length
        return (outputs, vectors, self.count), (self.count, 2**CODE_BITS, length), (outputs,)

    def shared(self) -> tuple[int, ...]:
        return (CODEBOOKS,) if self.format.shared_parts else ()

    def parts(self, weight: CompressedTensor) -> list[Tensor]:
        """Codes, codebooks and scale. Codes lie so that a kernel reads the file from front to back."""
        codes, codebooks_MPD, scale_O = self.format.unpack(weight)
        codes_MOJ = codes if isinstance(self.format, Additive) else codes[None]
        return [torch.stack(codes_MOJ.unbind(), -1), codebooks_MPD.contiguous(), scale_O.contiguous()]
