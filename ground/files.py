# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written beside their place and renamed into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` when the block ends well, else it is deleted."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
