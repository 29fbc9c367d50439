# SPDX-License-Identifier: Apache-2.0
"""What measuring losses takes in one process, in two workers and in two workers of Ray, and whether tables are equal.

    python benchmarks/measuring.py FOLDER [--size 512x512] [--formats int4-row,int8-row] [--ways 1 2 ray]

`benchmarks/synthetic_sdxl.py` writes such folders. One thread in each process. The model is calibrated and its layers
are stored in all formats once; then the stage `measure` runs in each way. Seconds are of the whole stage by the clock,
which is worth something where nothing else runs (`load` is the machine's before it began), and beside it processor
seconds of this process and of the worker that took most, with what they import: on a machine that nothing else uses the
stage takes about their sum. Ways that another run measured stay in the file.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from turbopocket.export.build.build import make_stage
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.export.verify.timed import machine_name
from turbopocket.ground.memory import anonymous_bytes
from turbopocket.quant import row_losses
from turbopocket.quant.row_losses import Question, RowLosses
from turbopocket.quant.workers import Workers

WAYS = {"1": Workers(), "2": Workers(2), "ray 1": Workers(1, "local"), "ray": Workers(2, "local")}
LOG = "TURBOPOCKET_MEASURED"
"""A folder in which each process writes what it took so far."""


def logged(questions: list[Question], job: Any) -> RowLosses:
    """What rows of a job lose."""
    found = questions[job.question].of_rows(job.rows, job.vectors)
    took = {"processor_seconds": time.process_time(), "anonymous_bytes": anonymous_bytes()}
    Path(os.environ[LOG], f"{os.getpid()}.json").write_text(json.dumps(took))
    return found


def measured(recipe: Recipe, folder: Path, workers: Workers) -> tuple[dict[str, Any], str]:
    """What the stage takes, and the table that it makes."""
    shutil.rmtree(os.environ[LOG], ignore_errors=True)
    Path(os.environ[LOG]).mkdir()
    progress = StageProgress()
    load, begun = os.getloadavg()[0], time.process_time()
    run = make_stage(recipe, folder / "out", "measure", progress, workers, folder / "run")
    here = time.process_time() - begun
    [product] = run.glob("measure-*")
    tables = "".join((product / name).read_text() for name in ("choices.json", "content.json"))
    shutil.rmtree(product)
    Path(os.environ[LOG], f"{os.getpid()}.json").unlink(missing_ok=True)
    others = [json.loads(each.read_text()) for each in Path(os.environ[LOG]).iterdir()]
    row = {
        "load": load,
        "seconds": progress.stage_seconds["measure"],
        "processor_seconds_here": here,
        "processor_seconds_of_workers": sorted(each["processor_seconds"] for each in others),
        "anonymous_bytes_of_workers": sorted(each["anonymous_bytes"] for each in others),
    }
    return row, tables


def main() -> None:
    """Measures in each way and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--formats", default="int4-row,int8-row")
    parser.add_argument("--content", nargs="*", default=[])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["1", "2", "ray"])
    parser.add_argument("--work", type=Path, help="where intermediate results stay for the next run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/measuring.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    row_losses._losses_of = logged
    values = {
        "model": {"source": asked.folder},
        "image": {"sizes": [asked.size]},
        "sampler": {"steps": asked.steps, "guidance": 0.0},
        "calibrate": {"pictures": 1},
        "compress": {"fit": "absmax", "formats": asked.formats.split(","), "content": asked.content},
    }
    recipe = make_recipe(values, "benchmark")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        os.environ[LOG] = str(folder / "log")
        make_stage(recipe, folder / "out", "calibrate", run=folder / "run")
        rows, tables = {}, set()
        for way in asked.ways:
            rows[way], table = measured(recipe, folder, WAYS[way])
            tables.add(table)
            print(way, json.dumps(rows[way], indent=1), flush=True)
    assert len(tables) == 1, "tables differ"
    before = json.loads(asked.out.read_text()) if asked.out.is_file() else {"ways": {}}
    found = {"machine": machine_name(), "size": asked.size, "steps": asked.steps, "formats": asked.formats}
    asked.out.write_text(json.dumps({**found, "ways": {**before["ways"], **rows}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
