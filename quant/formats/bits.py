# SPDX-License-Identifier: Apache-2.0
"""Codes of 1, 2, 3, 4, 6 or 8 bits as bytes, row by row, the low bits first:

code j of a row takes bits j * bits … of the row's bit string, byte borders are ignored (3 bits: 8 codes in 3 bytes),
and bit i of that string is bit i % 8 of byte i // 8. The last byte of a row is filled up with zero bits.
"""

import math

import torch
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Legal code widths: a whole number of these codes fills at most 3 bytes."""


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that one row of `columns` codes takes: rows start at a byte."""
    return -(-columns * bits // 8)


def pack(codes_OK: Tensor, bits: int) -> Tensor:
    """uint8 [O, ceil(K * bits / 8)] from integer codes [O, K]; negative codes as two's complement."""
    mask = 2**bits - 1
    if bits == 8:
        return codes_OK.to(torch.int16).bitwise_and(mask).to(torch.uint8).contiguous()
    outputs, columns = codes_OK.shape
    word_codes, word_bytes = _word(bits)
    words_OW = torch.zeros(outputs, -(-columns // word_codes), dtype=torch.int32)
    for place in range(min(word_codes, columns)):
        part = codes_OK[:, place::word_codes].to(torch.int32).bitwise_and_(mask)
        words_OW[:, : part.shape[1]] |= part << (place * bits)
    bytes_OWb = torch.stack([words_OW >> (8 * place) & 0xFF for place in range(word_bytes)], dim=-1)
    return bytes_OWb.to(torch.uint8).flatten(1)[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """int8 (signed) or uint8 codes [O, columns]: the inverse of `pack`."""
    codes = packed
    if bits != 8:
        word_codes, word_bytes = _word(bits)
        whole = torch.nn.functional.pad(packed, (0, -packed.shape[1] % word_bytes)).to(torch.int32)
        words_OW = sum(
            (whole[:, place::word_bytes] << (8 * place) for place in range(1, word_bytes)), whole[:, ::word_bytes]
        )
        parts = [(words_OW >> (place * bits)).bitwise_and_(2**bits - 1).to(torch.uint8) for place in range(word_codes)]
        codes = torch.stack(parts, dim=-1).flatten(1)[:, :columns]
    if not signed:
        return codes.contiguous()
    codes = codes.to(torch.int16)
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8)


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes they fill: at most 24 bits in all."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared
