# SPDX-License-Identifier: Apache-2.0
"""How long ONNX Runtime takes to open layers that its own operators decode: 100, 200 and 400 of them, by format.

    python benchmarks/opening.py [--out benchmarks/results/opening.json]

A chain of Linear layers of 64 x 64 as the target writes them, opened without our operators in a process of its own,
with the session options that the manifest asks for. Seconds are processor time on one thread, the least of three.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx import program
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.formats import CompressedTensor, LayerFormat, parse_format

COUNTS = (100, 200, 400)
FORMATS = ("int4-g32", "fp16", "avq2x8-d8")
WIDTH, TRIALS = 64, 3
OPEN = """
import sys, time
from turbopocket.runtimes.onnx.session import open_session
start = time.process_time()
open_session(sys.argv[1], threads=1)
print(time.process_time() - start)
"""


class Chain(ComponentModule):
    """Layers one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def made_up(format: LayerFormat, shape: tuple[int, ...]) -> CompressedTensor:
    """Codes drawn by chance: what they are costs no time."""
    parts = {
        name: torch.full(spec.shape, 2**-6, dtype=spec.dtype)
        if name == "scale"
        else torch.randint(0, 256, spec.shape, dtype=torch.uint8).to(spec.dtype)
        for name, spec in format.part_specs(shape).items()
    }
    return CompressedTensor(format, shape, parts)


def seconds(model: Path) -> float:
    """Processor time of opening it, the least of several."""
    command = [sys.executable, "-c", OPEN, str(model)]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(TRIALS))


def main(out: Path) -> None:
    measured: dict[str, dict[str, dict[str, float]]] = {name: {} for name in FORMATS}
    for count in COUNTS:
        layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count))).eval()
        component = Component("unet", Chain("unet", layers), {"x": torch.zeros(2, WIDTH)}, ("y",), role="denoiser")
        traced = program.trace(component)
        for name in FORMATS:
            weights = {path: made_up(parse_format(name), layer.shape) for path, layer in traced.layers.items()}
            with tempfile.TemporaryDirectory() as folder:
                model = Path(folder) / program.lower(traced, weights, Path(folder)).file
                nodes = len(onnx.load(model, load_external_data=False).graph.node)
                measured[name][str(count)] = {"seconds": seconds(model), "nodes": nodes}
            print(count, name, measured[name][str(count)], flush=True)
    write_json(out, {"onnxruntime": onnxruntime.__version__, "width": WIDTH, "opening": measured})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "opening.json")
    main(parser.parse_args().out)
