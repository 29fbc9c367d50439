# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written beside their place and renamed into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` when the block ends well, else it is deleted.

    Others may read it as the user's mask says, also where a library (safetensors) makes files for the user alone.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
