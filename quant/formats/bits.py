# SPDX-License-Identifier: Apache-2.0
"""Codes of 1, 2, 3, 4, 6 or 8 bits as bytes, row by row, as `ground/bits.py` has them; here of tensors."""

import torch
from torch import Tensor

from ...ground import bits as rows


def pack(codes_OK: Tensor, bits: int) -> Tensor:
    """uint8 [O, ceil(K * bits / 8)] from integer codes [O, K]; negative codes as two's complement."""
    return torch.from_numpy(rows.pack_rows(codes_OK.numpy(), bits))


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """int8 (signed) or uint8 codes [O, columns]: the inverse of `pack`."""
    return torch.from_numpy(rows.unpack_rows(packed.numpy(), bits, columns, signed))
