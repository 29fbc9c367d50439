# SPDX-License-Identifier: Apache-2.0
"""Commands on what a build makes on its way: its stages one by one, and clearing up after them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .door import emit
from .options import (
    AsJson,
    Assigned,
    Budget,
    Config,
    Formats,
    MaxRam,
    OptionalSource,
    PeakMemory,
    Ray,
    RecipeFile,
    RunFolder,
    TargetName,
    WorkerCount,
    asked_recipe,
    talk,
)

if TYPE_CHECKING:
    from .export.build.journal import Stage

stages_app = typer.Typer()
DOCS: "dict[Stage, str]" = {
    "calibrate": "Makes what a build needs of what each layer sees, and stops.",
    "measure": "Makes that, and what layers lose in each format, and stops.",
    "compress": "Makes that, the plan and the stored weights, and stops.",
    "lower": "Makes that and the target's files, and stops unchecked.",
}


def _add(stage: "Stage") -> None:
    def command(
        out: Annotated[Path, typer.Option(help="The artifact that `build` will make; results go to OUT.run.")],
        source: OptionalSource = None,
        config: Config = None,
        target: TargetName = None,
        budget: Budget = None,
        peak_memory: PeakMemory = None,
        recipe: RecipeFile = None,
        assigned: Assigned = None,
        formats: Formats = None,
        workers: WorkerCount = 1,
        ray: Ray = None,
        run: RunFolder = None,
        max_ram: MaxRam = None,
        as_json: AsJson = False,
    ) -> None:
        overrides = {
            "model.source": source,
            "model.config": config,
            "target.name": target,
            "compress.budget": budget,
            "compress.peak_memory": peak_memory,
            "compress.formats": formats and formats.split(","),
            "machine.max_ram": max_ram,
        }
        asked = asked_recipe(recipe, overrides, assigned)
        from . import Workers
        from .export.request import refuse_stage_output

        spread = Workers(workers, ray)
        refuse_stage_output(out, run)
        from .export.build.build import make_stage

        path = make_stage(asked, out, stage, talk(as_json), spread, run)
        emit({"run": str(path)}, as_json, lambda console: console.print(f"results   {path}", soft_wrap=True))

    stages_app.command(stage, help=DOCS[stage])(command)


for _stage in DOCS:
    _add(_stage)


@stages_app.command()
def clean(
    out: Annotated[Path, typer.Argument(help="An artifact that was, or was to be, built.")],
    run: RunFolder = None,
    as_json: AsJson = False,
) -> None:
    """Removes what builds of OUT left to go on from.

    The artifact and its report stay.
    """
    from .export.build.journal import clean as clean_run
    from .export.units import format_bytes

    path, freed = clean_run(out, run)
    emit(
        {"run": str(path), "freed_bytes": freed},
        as_json,
        lambda console: console.print(f"removed   {format_bytes(freed)} in {path}", soft_wrap=True),
    )
