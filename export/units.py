# SPDX-License-Identifier: Apache-2.0
"""Byte counts as people write and read them: decimal units, as stores and phones show them."""

import re

from ..ground.errors import TurbopocketError

UNIT_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MOST_BYTES = 10**15
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, name: str = "budget") -> int:
    """Returns the number of bytes that `text` names, such as "8MB" (8,000,000) or "1.5GiB".

    Raises TurbopocketError, in which it is called `name`, for no number, no unit, an unknown unit, or zero.
    """
    match = _BUDGET.fullmatch(text)
    units = {unit.lower(): count for unit, count in UNIT_BYTES.items()}
    if match is None or match[2].lower() not in units:
        raise TurbopocketError(
            f"{name} {text!r} is not a number with a unit; the units are {', '.join(UNIT_BYTES)}",
            hint="write it like 8MB or 1.3GB",
        )
    count = int(min(float(match[1]) * units[match[2].lower()], MOST_BYTES + 1))
    if count <= 0:
        raise TurbopocketError(f"{name} {text!r} is {count} bytes; it must be more than zero")
    if count > MOST_BYTES:
        raise TurbopocketError(f"{name} {text[:40]!r} is more than {MOST_BYTES:,} bytes, which nothing here has")
    return count


def format_bytes(count: float) -> str:
    """Returns `count` with the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.3f} GB"
