# SPDX-License-Identifier: Apache-2.0
"""Linear layers of codebooks in ExecuTorch: bytes, memory and time, by our kernel, by PyTorch's operators, and dense.

    python benchmarks/executorch_codebooks.py [--out benchmarks/results/executorch_codebooks.json]

24 layers of 1280 x 1280 in `avq2x8-d8`, one after the other, 16 rows of input. Each program runs in a process of the
C++ runner. Memory is how much more that process grows, files' pages included, from before the program is opened to
after its first run, than it does for one layer of 64 x 64, so the libraries are not in it. Times are the fastest of
several runs, programs in turns; read the ratios.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch import program as lowering
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.command import run
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.executorch.native.build import native_runner
from turbopocket.runtimes.executorch.native.runner import ExecuTorchNativeRunner

FORMAT = parse_format("avq2x8-d8")
WIDTH, LAYERS, ROWS, RUNS, TURNS = 1280, 24, 16, 9, 5
NARROW = 64
PROGRAMS = {"kernel": "kernel", "portable": "portable", "dense fp32": None}


class Stack(nn.Module):
    """As many Linear layers without bias, one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Wrapped(ComponentModule):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class OneComponent:
    """As much of a manifest as a runner reads."""

    def __init__(self, spec: Any) -> None:
        self.components, self.name, self.plan = {"stack": spec}, "stack", None


def random_weight(width: int, random: torch.Generator) -> CompressedTensor:
    """Values of the size that a trained layer's have: outputs of about 1 for inputs of about 1."""
    parts = {}
    for name, spec in FORMAT.part_specs((width, width)).items():
        if spec.dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=random)
        else:
            parts[name] = torch.randn(spec.shape, generator=random).to(spec.dtype)
    parts["scale"] = ((2 * width) ** -0.5 * (1 + 0.1 * parts["scale"].float())).half()
    return CompressedTensor(FORMAT, (width, width), parts)


def lowered(folder: Path, width: int, layers: int, form: Any) -> tuple[Path, int, float]:
    """The program, bytes that were planned for it, and how far it is from PyTorch with the same weights."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    stack, dense = Stack(width, layers), parse_format("fp32")
    weights = {f"stack.layers.{index}": random_weight(width, random) for index in range(layers)}
    x = torch.randn(1, ROWS, width, generator=random)
    for name, weight in weights.items():
        stack.get_submodule(name.removeprefix("stack.")).weight.data = FORMAT.decompress(weight)
    if form is None:
        shape = width, width
        weights = {
            name: CompressedTensor(dense, shape, {"weight": FORMAT.decompress(weight)})
            for name, weight in weights.items()
        }
    component = Component("stack", Wrapped("stack", stack.eval()), {"x": x}, ("y",), role="denoiser")
    traced = lowering.trace(component, ExecuTorchOptions(codebooks=form or "portable"))
    spec = lowering.lower(traced, weights, folder)
    manifest: Any = OneComponent(spec)
    with ExecuTorchNativeRunner(folder, manifest, {}) as runner:
        found = runner.run("stack", {"x": x.numpy()})["y"]
    error = relative_error(found, torch_runner([component]).run("stack", {"x": x.numpy()})["y"])
    planned = lowering.lowered_bytes(traced, {name: Scheme(weight.format) for name, weight in weights.items()})
    return folder / spec.file, planned, error


def measured(program: Path) -> dict[str, Any]:
    """What the C++ runner says of a fresh process that opens and runs the program."""
    found: dict[str, Any] = json.loads(run([str(native_runner()), "measure", str(RUNS), str(program)], "measure"))
    return found


def growth(found: dict[str, Any], base: dict[str, Any]) -> dict[str, int]:
    """Bytes by which a process grew from start to after its first run, beyond another's."""
    parts = {
        part: (found["ran"][f"{part}_bytes"] - found["start"][f"{part}_bytes"])
        - (base["ran"][f"{part}_bytes"] - base["start"][f"{part}_bytes"])
        for part in ("anon", "file")
    }
    return parts | {"resident": sum(parts.values()), "peak": found["peak_bytes"] - base["peak_bytes"]}


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "executorch_codebooks.json")
    options = parser.parse_args()
    compressed = LAYERS * FORMAT.nbytes((WIDTH, WIDTH))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        programs = {name: lowered(Path(folder) / name, WIDTH, LAYERS, form) for name, form in PROGRAMS.items()}
        narrow = {name: lowered(Path(folder) / f"{name} 1", NARROW, 1, form)[0] for name, form in PROGRAMS.items()}
        times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        for _ in range(TURNS):
            for name, (program, _, _) in programs.items():
                times[name] += measured(program)["run_ms"][1:]
        for name, (program, planned, error) in programs.items():
            rows[name] = {
                "file_bytes": program.stat().st_size,
                "planned_bytes": planned,
                "relative_error": error,
                "growth_bytes": growth(measured(program), measured(narrow[name])),
                "ms": min(times[name]),
            }
    for row in rows.values():
        row["resident_to_compressed"] = row["growth_bytes"]["resident"] / compressed
        row["speed_to_dense"] = rows["dense fp32"]["ms"] / row["ms"]
    about = {"layers": LAYERS, "width": WIDTH, "input_rows": ROWS, "compressed_weights_bytes": compressed}
    write_json(options.out, {**about, "programs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
