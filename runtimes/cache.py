# SPDX-License-Identifier: Apache-2.0
"""Where things lie that are made once and can be made again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` of ours in the user's cache folder, which is `XDG_CACHE_HOME` or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "turbopocket" / name
