# SPDX-License-Identifier: Apache-2.0
"""Codes of 1 to 8 bits as bytes, row by row, the low bits first:

code j of a row takes bits j * bits … of the row's bit string, byte borders are ignored (3 bits: 8 codes in 3 bytes),
and bit i of that string is bit i % 8 of byte i // 8. The last byte of a row is filled up with zero bits. That is how
stored weights, ONNX Runtime's MatMulNBits and Core ML's weight files have them.

Shape suffixes: R rows, K codes of a row, B bytes of a row, W words of a row.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that one row of `count` codes takes: rows start at a byte."""
    return -(-count * bits // 8)


def pack_rows(codes_RK: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """uint8 [R, ceil(K * bits / 8)] from integer codes [R, K]; negative codes as two's complement."""
    codes_RK = codes_RK.astype(np.uint8) & np.uint8(2**bits - 1)
    if bits == 8:
        return codes_RK
    rows, count = codes_RK.shape
    word_codes, word_bytes = _word(bits)
    words_RW = np.zeros((rows, -(-count // word_codes)), "<u4" if word_bytes <= 4 else "<u8")
    for place in range(min(word_codes, count)):
        part = codes_RK[:, place::word_codes].astype(words_RW.dtype)
        words_RW[:, : part.shape[1]] |= part << words_RW.dtype.type(place * bits)
    bytes_RWb = words_RW.view(np.uint8).reshape(rows, -1, words_RW.itemsize)[:, :, :word_bytes]
    return np.ascontiguousarray(bytes_RWb.reshape(rows, -1)[:, : packed_bytes(count, bits)])


def unpack_rows(packed_RB: NDArray[np.uint8], bits: int, count: int, signed: bool) -> NDArray[Any]:
    """int8 (signed) or uint8 codes [R, count]: the inverse of `pack_rows`."""
    codes_RK = packed_RB[:, :count]
    if bits != 8:
        rows, (word_codes, word_bytes) = len(packed_RB), _word(bits)
        words = -(-count // word_codes)
        kind: type[Any] = np.uint32 if word_bytes <= 4 else np.uint64
        padded_RB = np.zeros((rows, words * word_bytes), np.uint8)
        padded_RB[:, : packed_RB.shape[1]] = packed_RB
        bytes_RWb = padded_RB.reshape(rows, words, word_bytes)
        words_RW = np.zeros((rows, words), kind)
        for place in range(word_bytes):
            words_RW |= bytes_RWb[:, :, place].astype(kind) << kind(8 * place)
        codes_RWk = np.empty((rows, words, word_codes), np.uint8)
        for place in range(word_codes):
            codes_RWk[:, :, place] = (words_RW >> kind(place * bits)) & kind(2**bits - 1)
        codes_RK = codes_RWk.reshape(rows, -1)[:, :count]
    if not signed:
        return np.ascontiguousarray(codes_RK)
    spare = np.uint8(8 - bits)  # the sign moves to the byte's own, and back with copies of it
    return np.ascontiguousarray(codes_RK << spare).view(np.int8) >> np.int8(spare)


def pack_bits(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """uint8 [ceil(count * bits / 8)]: codes of any shape as one row."""
    return pack_rows(codes.reshape(1, -1), bits)[0]


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int, signed: bool = False) -> NDArray[Any]:
    """uint8 or (signed) int8 [count]: the inverse of `pack_bits`."""
    return unpack_rows(packed[None], bits, count, signed)[0]


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes they fill."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared
