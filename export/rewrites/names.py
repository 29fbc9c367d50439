# SPDX-License-Identifier: Apache-2.0
"""What rewrites are called. Nothing here needs PyTorch, so that a wrong name is refused before it is imported."""

from ...ground.errors import TurbopocketError

REWRITE_NAMES = ("bos-aware", "time-cache")
"""Every rewrite's name, in the order in which they are made; `REWRITES` are the rewrites."""


def known_rewrite(name: str) -> str:
    """Returns the name. Raises TurbopocketError when there is no such rewrite."""
    if name not in REWRITE_NAMES:
        raise TurbopocketError(f"{name} is no rewrite, known are {', '.join(REWRITE_NAMES)}")
    return name
