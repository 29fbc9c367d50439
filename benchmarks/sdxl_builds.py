# SPDX-License-Identifier: Apache-2.0
"""Builds of SDXL-Turbo's size and topology on this machine: seconds of each stage, peak memory, bytes, parity.

    python benchmarks/sdxl_builds.py FOLDER [--fit mse] [--formats int4-row,int8-row] [--budget 2.2GB] [--target onnx]
        [--pin 'unet.*=avq2x8-d8'] [--most-memory 5GB] [--most-minutes 45]

`benchmarks/synthetic_sdxl.py` writes such folders. A build is a process of its own, and what it and all that it starts
hold of anonymous memory, native libraries included, is read twice a second. Its journal lies beside the output: a
benchmark that was stopped goes on where it was, and says which stages it took from there. Results are appended.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from turbopocket.export.units import format_bytes, parse_bytes
from turbopocket.ground.memory import anonymous_bytes

RESULTS = Path(__file__).parent / "results" / "sdxl_builds.json"
INTERVAL = 0.5
COMMAND = (sys.executable, "-c", "from turbopocket.cli import main; main()", "build")


def main() -> None:
    """Builds once, and appends what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/sdxl"))
    parser.add_argument("--fit", default="mse")
    parser.add_argument("--formats", default="int4-row,int8-row")
    parser.add_argument("--budget", default="2.2GB")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--pin", action="append", default=[], help="GLOB=FORMAT; several times")
    parser.add_argument("--pictures", type=int, default=16, help="drawn while calibrating")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--most-memory", help="fails where the build held more")
    parser.add_argument("--most-minutes", type=float, help="fails where it took longer")
    args = parser.parse_args()
    found = _built(args)
    rows = json.loads(args.results.read_text()) if args.results.is_file() else []
    args.results.write_text(json.dumps([*rows, found], indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    missed = []
    if args.most_memory and found["peak_anonymous_bytes"] > parse_bytes(args.most_memory):
        missed.append(f"{format_bytes(found['peak_anonymous_bytes'])} of memory, {args.most_memory} are allowed")
    if args.most_minutes and found["seconds"] > 60 * args.most_minutes:
        missed.append(f"{found['seconds'] / 60:.0f} minutes, {args.most_minutes:g} are allowed")
    if missed:
        raise SystemExit(f"the build took {' and '.join(missed)}")


def _built(args: argparse.Namespace) -> dict[str, Any]:
    asked = {
        "calibrate.pictures": args.pictures,
        "parity.pictures": 1,
        "sampler.steps": 1,
        "sampler.guidance": 0.0,
    }
    options = [
        *("--out", str(args.out), "--target", args.target, "--fit", args.fit, "--formats", args.formats),
        *("--budget", args.budget, "--size", args.size, "--keep", "--overwrite"),
        *(part for pin in args.pin for part in ("--pin", pin)),
        *(part for key, value in asked.items() for part in ("--set", f"{key}={value}")),
    ]
    start, log = time.time(), args.out.parent / f"{args.out.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stderr:
        build = subprocess.Popen([*COMMAND, str(args.folder), *options], stdout=stderr, stderr=stderr)
        peaks: dict[int, int] = {}
        while build.poll() is None:
            stage = len(_finished(log))
            peaks[stage] = max(peaks.get(stage, 0), anonymous_bytes(build.pid))
            time.sleep(INTERVAL)
    if build.returncode:
        raise SystemExit(f"the build ended with {build.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = args.out.parent / f"{args.out.name}.report"
    measured = json.loads((report / "measurements.json").read_text(encoding="utf-8"))
    planned = json.loads((report / "plan.json").read_text(encoding="utf-8"))
    return {
        "folder": args.folder.name,
        "target": args.target,
        "fit": args.fit,
        "formats": args.formats,
        "pins": args.pin,
        "size": args.size,
        "pictures": args.pictures,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "seconds": round(time.time() - start),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "stage_seconds": {name: round(seconds, 1) for name, seconds in measured["stage_seconds"].items()},
        "foreseen": _foreseen(log.read_text(encoding="utf-8")),
        "peak_anonymous_bytes": max(peaks.values()),
        "stage_peak_bytes": {
            name: peaks[index] for index, name in enumerate([*_finished(log), "report"]) if index in peaks
        },
        "artifact_bytes": measured["artifact_bytes"],
        "planned_bytes": planned["total_bytes"],
        "worst_relative_error": _worst(json.loads((report / "parity.json").read_text(encoding="utf-8"))),
        "memory": measured["memory"],
        "load_average_at_end": round(os.getloadavg()[0], 1),
    }


def _finished(log: Path) -> list[str]:
    """The stages that have ended, as the build tells."""
    return re.findall(r"^(\S.*?) +[\d.]+ s$", log.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _foreseen(log: str) -> dict[str, dict[str, int]]:
    """What the build said before it started, by stage and as `build` of the whole."""
    rows = re.findall(r"^(\S.*?) +([\d.]+ [kMG]?B) memory .* (\d+):(\d+):(\d+)$", log, flags=re.MULTILINE)
    return {
        name: {"bytes": parse_bytes(memory), "seconds": 3600 * int(hours) + 60 * int(minutes) + int(seconds)}
        for name, memory, hours, minutes, seconds in rows
    }


def _worst(parity: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By runtime and component, of all outputs of all calls: the gap to PyTorch with the same stored weights."""
    worst: dict[str, dict[str, float]] = {}
    for runtime, found in parity.items():
        by_component = worst.setdefault(runtime, {})
        for row in found["rows"]:
            error = row["relative_error"]
            by_component[row["component"]] = max(error, by_component.get(row["component"], 0.0))
    return worst


if __name__ == "__main__":
    main()
