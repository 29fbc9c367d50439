# SPDX-License-Identifier: Apache-2.0
"""Links in a model's folder: a file that is shipped has to be the model's, not whatever a link in it leads to."""

from collections.abc import Iterable
from pathlib import Path

from ...ground.errors import TurbopocketError


def refuse_links_out(paths: Iterable[Path], model: Path) -> None:
    """Raises TurbopocketError for the first of the paths that leads out of the model's folder.

    In the hub's cache the files of `snapshots/<revision>` are links into `blobs` beside `snapshots`: these are its own.
    """
    folder = model.resolve()
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise TurbopocketError(
                f"{path} is a link to {target}, which is not in the model's folder and would be shipped with it",
                hint="put the file itself there",
            )
