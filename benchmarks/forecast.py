# SPDX-License-Identifier: Apache-2.0
"""What builds were foreseen to take beside what they took: memory and processor time of each stage, and disk.

    python benchmarks/forecast.py [--model FOLDER] [--set KEY=VALUE …] [--json FILE]

One build in one thread, from nothing, whose stages are timed in processor seconds: a machine that others use as well
tells nothing else that is worth comparing. Processes that it starts (ONNX Runtime, when memory is measured) are not in
these. Without a model: the bundled one.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from turbopocket import Recipe, build
from turbopocket.export.build import forecast as forecasting
from turbopocket.export.build.forecast import Forecast
from turbopocket.export.output.owned import journal_files
from turbopocket.export.progress import StageProgress
from turbopocket.export.settings import with_values

ELSEWHERE = ("memory",)
"""Stages whose time passes in other processes."""
SHORT_S = 2.0
"""Stages that take less, and so may be off by a large part of nothing."""


def measured(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Builds, and returns the forecast beside what was measured."""
    foreseen: list[Forecast] = []
    tell = forecasting.tell

    def told(forecast: Forecast, *arguments: Any) -> None:
        foreseen.append(forecast)
        tell(forecast, *arguments)

    forecasting.tell = told
    progress = StageProgress(clock=time.process_time)
    build(recipe, folder / "artifact", progress=progress, keep=True)
    files = sum(each.stat().st_size for each in journal_files(folder / "artifact.run"))
    stages = {
        stage.name: {
            "memory_bytes": [stage.memory_bytes, progress.stage_peak_bytes[stage.name]],
            "seconds": [round(stage.seconds, 2), round(progress.stage_seconds[stage.name], 2)],
        }
        for stage in foreseen[0].stages
    }
    return {"stages": stages, "disk_bytes": [foreseen[0].stages[-1].scratch_bytes, files]}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Foreseen over measured: the peak, all seconds, and the stages that are off by more than a quarter."""
    stages = found["stages"]
    peaks = [max(each["memory_bytes"][side] for each in stages.values()) for side in (0, 1)]
    here = [each["seconds"] for name, each in stages.items() if name not in ELSEWHERE]
    seconds = [sum(each[side] for each in here) for side in (0, 1)]
    off = {
        f"{name} {what}": round(each[what][0] / max(each[what][1], 1e-9), 2)
        for name, each in stages.items()
        for what in ("memory_bytes", "seconds")
        if (what == "memory_bytes" or (name not in ELSEWHERE and max(each[what]) > SHORT_S))
        and not 0.75 < each[what][0] / max(each[what][1], 1e-9) < 1.25
    }
    return {
        "peak": round(peaks[0] / peaks[1], 3),
        "seconds": round(seconds[0] / seconds[1], 3),
        "off_by_more_than_a_quarter": off,
    }


def main() -> None:
    """Builds, prints a line a stage, and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--set", dest="assigned", action="append", default=[])
    parser.add_argument("--json", type=Path, help="results, to which this one is added under the model's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = with_values(Recipe(), {"model.source": options.model}, options.assigned)
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(recipe, Path(scratch))
    found |= {"recipe": options.assigned, "summary": summary(found), "machine": platform.machine()}
    for name, each in found["stages"].items():
        (memory, peak), (foreseen, took) = each["memory_bytes"], each["seconds"]
        print(f"{name:12} {memory / 1e6:8.0f} MB foreseen {peak / 1e6:8.0f} measured {foreseen:8.1f} s {took:8.1f}")
    print(json.dumps(found["summary"], indent=1))
    if options.json is not None:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        known[Path(options.model).name] = found
        options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
