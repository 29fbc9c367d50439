# SPDX-License-Identifier: Apache-2.0
"""How long ONNX Runtime takes to open layers that its own operators decode, and those that ours do, by format.

    python benchmarks/opening.py [--out benchmarks/results/opening.json]

Chains of 100, 200 and 400 Linear layers of 64 x 64, and the UNet of `pocket-turbo` (layers that do not fit the format
in fp16), as the target writes them, each opened in a process of its own with the session options that the manifest asks
for; codebooks by our operators too where `make kernels` built them. Seconds are processor time on one thread, the least
of three.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx import program
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.formats import CompressedTensor, LayerFormat, parse_format
from turbopocket.runtimes.kernels.library import onnx_operators

COUNTS = (100, 200, 400)
CODEBOOKS = "avq2x8-d8"
FORMATS = ("int4-g32", "fp16", CODEBOOKS)
OURS = f"{CODEBOOKS}, our operators"
WIDTH, TRIALS = 64, 3
OPEN = """
import sys, time
from pathlib import Path
from turbopocket.runtimes.onnx.session import open_session
start = time.process_time()
open_session(sys.argv[1], threads=1, operators=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
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


def seconds(model: Path, operators: Path | None = None) -> float:
    """Processor time of opening it, the least of several."""
    command = [sys.executable, "-c", OPEN, str(model), *([str(operators)] if operators else [])]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(TRIALS))


def chain(count: int) -> Component:
    """So many small Linear layers."""
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count))).eval()
    return Component("unet", Chain("unet", layers), {"x": torch.zeros(2, WIDTH)}, ("y",), role="denoiser")


def opened(component: Component) -> dict[str, float]:
    """Seconds by format."""
    traced, found = program.trace(component), {}
    for name in FORMATS:
        asked, dense = parse_format(name), parse_format("fp16")
        formats = {path: dense if asked.fits(layer.shape) else asked for path, layer in traced.layers.items()}
        weights = {path: made_up(format, traced.layers[path].shape) for path, format in formats.items()}
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / program.lower(traced, weights, Path(folder)).file
            found[name] = seconds(model)
            if name == CODEBOOKS and (operators := onnx_operators()):
                found[OURS] = seconds(model, operators)
    print(component.name, len(traced.layers), found, flush=True)
    return found


def main(out: Path) -> None:
    """Measures and writes the JSON."""
    unet = next(each for each in components_of(load("pocket-turbo")) if each.name == "unet")
    measured = {"UNet": opened(unet)} | {str(count): opened(chain(count)) for count in COUNTS}
    write_json(out, {"onnxruntime": onnxruntime.__version__, "width": WIDTH, "opening": measured})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "opening.json")
    main(parser.parse_args().out)
