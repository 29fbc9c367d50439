# SPDX-License-Identifier: Apache-2.0
"""Codes of 4 or 8 bits as bytes, row by row, the low nibble first:

byte j of a row at 4 bits = code[2j] | code[2j + 1] << 4; an odd row ends in a zero nibble.
"""

import torch
from torch import Tensor


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that one row of `columns` codes takes: rows start at a byte."""
    return -(-columns * bits // 8)


def pack(codes_OK: Tensor, bits: int) -> Tensor:
    """uint8 [O, ceil(K * bits / 8)] from integer codes [O, K]; negative codes as two's complement."""
    unsigned_OK = codes_OK.to(torch.int16).bitwise_and(2**bits - 1).to(torch.uint8)
    if bits == 8:
        return unsigned_OK.contiguous()
    if unsigned_OK.shape[1] % 2:
        unsigned_OK = torch.nn.functional.pad(unsigned_OK, (0, 1))
    return unsigned_OK[:, 0::2] | unsigned_OK[:, 1::2] << 4


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """int8 (signed) or uint8 codes [O, columns]: the inverse of `pack`."""
    codes = packed
    if bits == 4:
        codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :columns]
    if not signed:
        return codes.contiguous()
    codes = codes.to(torch.int16)
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8)
