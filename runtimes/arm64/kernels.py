# SPDX-License-Identifier: Apache-2.0
"""Which kernels ran: the instructions that the emulator translated, counted by what only certain kernels use.

Masks are those of the Arm Architecture Reference Manual (DDI 0487), A64 "Data Processing -- Scalar Floating-Point and
Advanced SIMD".
"""

import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_VECTOR_INSTRUCTION = re.compile(rb"^0x([0-9a-f]+): +([0246][ef][0-9a-f]{6}) ", re.MULTILINE)
"""A line of the log; words of the class "Scalar FP and Advanced SIMD" have 0x0E or 0x0F in their low seven top bits."""


@dataclass(frozen=True)
class Family:
    """Instructions that belong together: (mask, value) of the words of each encoding."""

    name: str
    encodings: tuple[tuple[int, int], ...]


FAMILIES = (
    # FMLA of float32 vectors, by vector and by element
    Family("fp32", ((0xBFE0FC00, 0x0E20CC00), (0xBFC0F400, 0x0F801000))),
    # SMLAL, UMLAL, SMULL and UMULL: int8 products on CPUs without dot product
    Family(
        "widening multiply", tuple((0xBFE0FC00, value) for value in (0x0E208000, 0x2E208000, 0x0E20C000, 0x2E20C000))
    ),
    # SDOT and UDOT, by vector and by element
    Family(
        "dot product",
        ((0xBFE0FC00, 0x0E809400), (0xBFE0FC00, 0x2E809400), (0xBFC0F400, 0x0F80E000), (0xBFC0F400, 0x2F80E000)),
    ),
    # SMMLA, UMMLA, USMMLA and USDOT
    Family(
        "i8mm",
        ((0xFFE0FC00, 0x4E80A400), (0xFFE0FC00, 0x6E80A400), (0xFFE0FC00, 0x4E80AC00), (0xBFE0FC00, 0x0E809C00)),
    ),
    # BFMMLA and BFDOT
    Family("bf16", ((0xFFE0FC00, 0x6E40EC00), (0xBFE0FC00, 0x2E40FC00))),
    # FMLA of float16 vectors, by vector and by element
    Family("fp16", ((0xBFE0FC00, 0x0E400C00), (0xBFC0F400, 0x0F001000))),
)


def kernels_in(log: Path, ranges: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Instructions of each family among those in `log` whose addresses lie in one of `ranges` [start, end).

    The log is QEMU's (`-d in_asm`): each instruction once, when its block is first about to run.
    """
    within = list(ranges)
    counts = {family.name: 0 for family in FAMILIES}
    for address, word in _vector_instructions(log):
        if any(start <= address < end for start, end in within):
            for family in FAMILIES:
                counts[family.name] += any(word & mask == value for mask, value in family.encodings)
    return counts


def _vector_instructions(log: Path) -> set[tuple[int, int]]:
    """(address, word) of every one in the log; a block that was translated again counts once."""
    with log.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return {(int(found[1], 16), int(found[2], 16)) for found in _VECTOR_INSTRUCTION.finditer(text)}
