# SPDX-License-Identifier: Apache-2.0
"""The compress stage on one Ray node of this machine and on two, each of one CPU: seconds, and whether bytes are equal.

    python benchmarks/ray_nodes.py [--layers 12] [--out benchmarks/results/ray_nodes.json]

Layers of several widths are made, with statistics in files as a build has them, and fitted by vqdm. Seconds are by the
clock, from the first job to the last result; nodes and workers are there before. Besides, two local worker processes.
"""

import argparse
import hashlib
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster
from torch import nn

from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.blockwise import calibrate_to_files
from turbopocket.quant.compress import compress
from turbopocket.quant.fit import VQDM
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import LayerStats, SecondMoment
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.workers import Spread, Workers

FORMAT = "avq2x8-d8"
WIDTHS = (320, 640, 480, 960)


def layers_and_stats(count: int, folder: Path) -> tuple[dict[str, nn.Module], dict[str, LayerStats]]:
    """So many Linear layers, fed vectors whose n-th entry has energy 1 / n."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(WIDTHS[index % len(WIDTHS)], 640) for index in range(count)])
    inputs = [torch.randn(2000, w) * torch.arange(1, w + 1).rsqrt() for w in WIDTHS]
    blocks = {f"unet.{index}": layer for index, layer in enumerate(model)}

    def run() -> None:
        for index, layer in enumerate(model):
            layer(inputs[index % len(WIDTHS)])

    stats = calibrate_to_files({"unet": model}, blocks, run, (SecondMoment,), folder)
    return compressible_layers("unet", model), dict(stats)


def timed(layers: dict[str, nn.Module], stats: dict[str, LayerStats], spread: Spread) -> tuple[float, str]:
    """Seconds, and a hash of everything stored."""
    list(spread(warm, range(4)))
    choices = []
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        choices.append(Choice(name, shape, FORMAT, parse_format(FORMAT).nbytes(shape), 0.0))
    start, told = time.monotonic(), hashlib.sha256()
    stored = compress(layers, Plan(tuple(choices), 0, None), VQDM, stats, spread)
    seconds = time.monotonic() - start
    for name, each in stored.items():
        for part, tensor in each.parts.items():
            told.update(f"{name}/{part}".encode() + tensor.numpy().tobytes())
    return seconds, told.hexdigest()


def warm(job: int) -> int:
    """Has a worker import what it will need."""
    parse_format(FORMAT).compress(torch.randn(256, 64), VQDM, torch.eye(64))
    return job


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ray_nodes.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = layers_and_stats(asked.layers, Path(folder))
        for nodes in (1, 2):
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            for _ in range(nodes - 1):
                cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            with Workers(nodes, cluster.address).open() as spread:
                seconds, told = timed(*made, spread)
            cluster.shutdown()
            rows[f"{nodes} Ray nodes"] = {"seconds": seconds, "sha256": told}
            print(rows, flush=True)
        for count in (1, 2):
            with Workers(count).open() as spread:
                seconds, told = timed(*made, spread)
            rows[f"{count} processes"] = {"seconds": seconds, "sha256": told}
            print(rows, flush=True)
    result = {
        "format": FORMAT,
        "layers": asked.layers,
        "machine": platform.processor() or platform.machine(),
        "ray_ratio": rows["1 Ray nodes"]["seconds"] / rows["2 Ray nodes"]["seconds"],
        "process_ratio": rows["1 processes"]["seconds"] / rows["2 processes"]["seconds"],
        "same_bytes": len({row["sha256"] for row in rows.values()}) == 1,
        "rows": rows,
    }
    write_json(asked.out, result)
    print(result)


if __name__ == "__main__":
    main()
