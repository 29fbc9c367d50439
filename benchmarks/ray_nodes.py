# SPDX-License-Identifier: Apache-2.0
"""What fitting layers takes on a Ray cluster of one node and of two, of one core each, and whether bytes are equal.

    python benchmarks/ray_nodes.py [--model pocket-turbo] [--formats avq2x8-d8,int8-row] [--budget 5.5MB]

Two nodes on one machine stand for two machines, but for what is sent: it is copied, not sent. The model is calibrated
once; then layers are tried in their formats and fitted by VQDM in this process, on one node and on both, in turns.
Seconds are by the clock, worth something where nothing else runs; `load` is the machine's before each began.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from turbopocket.export.build.build import make_stage
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.workers import Workers

PORT, ROUNDS = 6399, 2
STAGES = ("try formats", "compress")


@contextmanager
def nodes(count: int) -> Iterator[str]:
    """The address of a cluster of so many nodes with one core each."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--disable-usage-stats"]
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run([*command, "--head", f"--port={PORT}", "--include-dashboard=false"], **quiet)
        for _ in range(count - 1):
            subprocess.run([*command, f"--address=127.0.0.1:{PORT}"], **quiet)
        yield f"127.0.0.1:{PORT}"
    finally:
        subprocess.run([command[0], "stop", "--force"], **quiet)


def fitted(recipe: Recipe, calibrated: Path, workers: Workers) -> tuple[dict[str, Any], str]:
    """Seconds of the stages, and a digest of all that was stored."""
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        shutil.copytree(calibrated, run)
        progress, load = StageProgress(), os.getloadavg()[0]
        product = make_stage(recipe, Path(temporary) / "out", "compress", progress, workers, run)
        files = sorted(path for path in product.glob("compress-*/**/*") if path.is_file())
        assert files
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    seconds = {name: round(progress.stage_seconds[name], 2) for name in STAGES}
    return {"load": round(load, 1), "seconds": seconds}, digest


def main() -> None:
    """Measures in each way and writes the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pocket-turbo")
    parser.add_argument("--formats", default="avq2x8-d8,int8-row")
    parser.add_argument("--budget", default="5.5MB")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ray_nodes.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    formats = asked.formats.split(",")
    compress = {"fit": "vqdm", "formats": formats, "budget": asked.budget}
    recipe = make_recipe({"model": {"source": asked.model}, "compress": compress}, "benchmark")
    ways: dict[str, list[dict[str, Any]]] = {"this process": [], "one node": [], "two nodes": []}
    digests = set()
    with tempfile.TemporaryDirectory() as temporary:
        calibrated = make_stage(recipe, Path(temporary) / "out", "calibrate", run=Path(temporary) / "run")
        for _ in range(ROUNDS):
            for name, count in zip(ways, (0, 1, 2), strict=True):
                if count:
                    with nodes(count) as address:
                        time.sleep(5)  # what starts a node goes on for a while
                        row, digest = fitted(recipe, calibrated, Workers(count, address))
                else:
                    row, digest = fitted(recipe, calibrated, Workers())
                digests.add(digest)
                ways[name].append(row)
                print(name, row, flush=True)
    assert len(digests) == 1, "bytes differ"
    least = {
        name: {stage: min(row["seconds"][stage] for row in rows) for stage in STAGES} for name, rows in ways.items()
    }
    ratios = {stage: round(least["one node"][stage] / least["two nodes"][stage], 2) for stage in STAGES}
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    asking = {"model": asked.model, "formats": formats, "budget": asked.budget}
    write_json(asked.out, machine | asking | {"ways": ways, "least_seconds": least, "one_over_two_nodes": ratios})
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
