# SPDX-License-Identifier: Apache-2.0
"""One request, one artifact for each of its targets: all of them or none."""

from dataclasses import replace
from pathlib import Path

from ...quant.workers import IN_TURN, Workers
from ..output.owned import refuse_builds
from ..output.staging import claimed, output_path, run_folder
from ..progress import StageProgress
from ..recipe import Recipe
from .build import build
from .journal import settle
from .outcome import Built


def build_targets(
    recipe: Recipe,
    out: Path | str,
    overwrite: bool = False,
    quiet: bool = False,
    workers: Workers = IN_TURN,
    keep: bool | None = None,
    run: Path | None = None,
) -> list[Built]:
    """Makes the artifact `out` for the recipe's target, or `out/<target>` for each when there are several.

    An artifact has its report beside it; all share the folder `run`, by default `<out>.run`, for what stages make.
    Progress is told on stderr unless `quiet`. Raises what `build` raises; then nothing is written but that folder.
    """
    out, recipes = Path(out), recipe.per_target()
    if len(recipes) == 1:
        return [build(recipe, out, overwrite, StageProgress(quiet), workers, keep, run)]
    out = output_path(out)
    where = run or run_folder(out)
    with claimed(out, lambda: refuse_builds(out, where, overwrite)) as claim, claim.staged(out) as (folder,):
        made = [
            build(single, folder / name, False, StageProgress(quiet), workers, True, where)
            for name, single in recipes.items()
        ]
    settle(where, keep, StageProgress(quiet))
    return [replace(each, folder=out / each.folder.name, report=_moved(each, out)) for each in made]


def _moved(built: Built, out: Path) -> Path:
    return out / built.report.relative_to(built.folder.parent)
