# SPDX-License-Identifier: Apache-2.0
"""The folder that a killed run goes on from, and the request that it is of."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ground.errors import TurbopocketError
from ...ground.files import write_whole
from ..checkpoint.source import require_source
from ..evidence import read_prompts
from ..output.owned import refuse_folder, refuse_run
from ..output.staging import output_path, run_folder, settle_output
from .recipe import DistillRecipe

if TYPE_CHECKING:  # what is refused needs no PyTorch
    from ..families.base import LoadedModel

RUN_FILE = "run.json"
_OF_THE_MACHINE = ("precision", "gradient_checkpointing")
"""Keys that a run may go on with another value of."""


def claim_run(run: Path, recipe: DistillRecipe, model: "LoadedModel") -> None:
    """Makes the folder of checkpoints and logs, or finds it of this run. Raises TurbopocketError for another's.

    The recipe is one whose guidance is known.
    """
    asked = recipe.model_dump(mode="json")
    wanted: dict[str, Any] = {
        "model": model.name,
        "parameters": sum(parameter.numel() for parameter in model.modules["unet"].parameters()),
        "guidance": recipe.teacher.guidance,
        "seed": recipe.seed,
        **{key: value for key, value in asked["distill"].items() if key not in _OF_THE_MACHINE},
    }
    file = run / RUN_FILE
    if not file.is_file():
        run.mkdir(parents=True, exist_ok=True)
        with write_whole(file) as partial:
            partial.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    try:
        found = json.loads(file.read_text())
        odd = [key for key in wanted if found[key] != wanted[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise TurbopocketError(f"{file} is not the record of a distillation run: {error}") from error
    if odd:
        raise TurbopocketError(
            f"{run} holds another run: {odd[0]} is {found[odd[0]]!r} there, {wanted[odd[0]]!r} here",
            hint="remove that folder, or give another --out",
        )


def refuse_recipe(recipe: DistillRecipe, out: Path, overwrite: bool) -> None:
    """Raises TurbopocketError for what this machine can tell to be wrong of a request before PyTorch is imported: the
    teacher or the prompts are not there, or `out` can not become a student. The run asks the same functions."""
    require_source(recipe.teacher.source, recipe.teacher.config)
    if recipe.distill.prompts is not None:
        read_prompts(recipe.distill.prompts)
    settle_output(out)
    refuse_student(output_path(out), overwrite)


def refuse_student(out: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when a student can not take the place of what is at `out`, or its run that beside it."""
    refuse_folder(out, overwrite)
    run = run_folder(out)
    known = (run / RUN_FILE).is_file()
    refuse_run(run, [] if known else [path for path in sorted(run.glob("*")) if path.name != f"{RUN_FILE}.partial"])
