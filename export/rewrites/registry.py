# SPDX-License-Identifier: Apache-2.0
"""Which rewrites there are."""

from ...ground.errors import TurbopocketError
from .base import Rewrite
from .bos_aware import BosAware
from .time_cache import TimeCache

REWRITES: dict[str, Rewrite] = {rewrite.name: rewrite for rewrite in (BosAware(), TimeCache())}
"""Every rewrite by its name, in the order in which they are made."""


def known_rewrite(name: str) -> str:
    """Returns the name. Raises TurbopocketError when there is no such rewrite."""
    if name not in REWRITES:
        raise TurbopocketError(f"{name} is no rewrite, known are {', '.join(REWRITES)}")
    return name
