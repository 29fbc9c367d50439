# SPDX-License-Identifier: Apache-2.0
"""Which rewrites there are."""

from .base import Rewrite
from .bos_aware import BosAware
from .time_cache import TimeCache

REWRITES: dict[str, Rewrite] = {rewrite.name: rewrite for rewrite in (BosAware(), TimeCache())}
"""Every rewrite by its name, in the order in which they are made."""
