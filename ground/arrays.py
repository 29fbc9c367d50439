# SPDX-License-Identifier: Apache-2.0
"""Named arrays, as all runtimes take and give them."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from .errors import TurbopocketError

Arrays = dict[str, NDArray[Any]]


def check_names(component: str, kind: str, expected: Sequence[str], found: Sequence[str]) -> None:
    """Returns when both hold the same names in any order; TurbopocketError names the difference."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise TurbopocketError(f"{component}: {kind} are {'; '.join(parts)}; expected {', '.join(expected)}")
