# SPDX-License-Identifier: Apache-2.0
"""The page again, from what a build left; what is no artifact is refused before what draws charts is imported."""

from pathlib import Path

from ...ground.errors import TurbopocketError
from ...runtimes.manifest import load_manifest
from ..output.staging import report_folder, settle_output


def rewrite_report(artifact: Path) -> Path:
    """Returns the page of `artifact`, made again from what its build left in `report_folder(artifact)`.

    Raises TurbopocketError naming the first missing or damaged file.
    """
    settle_output(artifact)
    manifest = load_manifest(artifact)
    folder = report_folder(artifact.absolute())
    if not folder.is_dir():
        raise TurbopocketError(f"{artifact} has no measurements: {folder} is missing", hint="build again")
    from .data import ReportData
    from .page import write_report

    return write_report(folder, ReportData.load(folder, manifest))
