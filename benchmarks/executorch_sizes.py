# SPDX-License-Identifier: Apache-2.0
"""Bytes that one layer more adds to an ExecuTorch program beside its constants, against what is planned for it.

    python benchmarks/executorch_sizes.py [--out benchmarks/results/executorch_sizes.json]

A program of a norm, SiLU and a layer, `LAYERS` times over, less one without the layers, by the number of layers. Norms
are GroupNorm before convolutions and LayerNorm before Linear, as in a UNet. What is planned are the counts of
`export/targets/executorch/size.py`, which are to hold for whole programs: a layer may be found larger.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.version import __version__
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch.program import TracedProgram, lower, trace
from turbopocket.export.targets.executorch.size import KEY_BYTES, OPERATOR_BYTES, PLACE_BYTES, constants_bytes
from turbopocket.export.targets.executorch.stores import STORES
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.formats import CompressedTensor, LayerFormat, parse_format
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import Scheme

LAYERS, WIDTH = 6, 64
RANGES = Ranges((-4.1, 4.0), (-3.9, 4.2), 1.0, 1.0)
CASES = {
    "fp32 linear": ("fp32", 0, {}),
    "fp32 conv": ("fp32", 3, {}),
    "int8-row linear": ("int8-row", 0, {}),
    "int4-g32 linear": ("int4-g32", 0, {}),
    "int8-row 1x1 conv": ("int8-row", 1, {}),
    "int8-row conv": ("int8-row", 3, {}),
    "int8-row linear, static": ("int8-row", 0, {"activations": "static"}),
    "int8-row conv, static": ("int8-row", 3, {"activations": "static"}),
    "vq8-d4 linear": ("vq8-d4", 0, {}),
    "avq3x8-d8 linear": ("avq3x8-d8", 0, {}),
    "vq8-d4 conv": ("vq8-d4", 3, {}),
    "avq2x8-d8 conv": ("avq2x8-d8", 3, {}),
    "avq2x8-d8 linear, kernel": ("avq2x8-d8", 0, {"codebooks": "kernel"}),
    "avq2x8-d8 conv, kernel": ("avq2x8-d8", 3, {"codebooks": "kernel"}),
}
"""Format, side of a convolution's kernel or 0 for a Linear, and options of the target."""


class Chain(nn.Module):
    """Norms and SiLU, with a layer behind each where there are layers."""

    def __init__(self, kernel: int, layers: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, WIDTH) if kernel else nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        made = (
            nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2) if kernel else nn.Linear(WIDTH, WIDTH)
            for _ in self.norms
        )
        self.layers = nn.ModuleList(made) if layers else [lambda x: x] * LAYERS

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(F.silu(norm(x)))
        return x


class Wrapped(ComponentModule):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def traced_chain(kernel: int, layers: bool, options: Mapping[str, Any]) -> TracedProgram:
    """The chain, exported once."""
    torch.manual_seed(0)
    x = torch.zeros(1, WIDTH, 8, 8) if kernel else torch.zeros(1, 16, WIDTH)
    component = Component("chain", Wrapped("chain", Chain(kernel, layers).eval()), {"x": x}, ("y",), role="denoiser")
    return trace(component, ExecuTorchOptions(**options))


def random_weight(format: LayerFormat, shape: tuple[int, ...], seed: int) -> CompressedTensor:
    """Any numbers: no two layers have equal ones, which a program would hold once."""
    random = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randint(1, 100, spec.shape, generator=random).to(spec.dtype)
        for name, spec in format.part_specs(shape).items()
    }
    return CompressedTensor(format, shape, parts)


def row(text: str, kernel: int, options: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of one layer beside its constants: found, and planned."""
    format = parse_format(text)
    plain, chain = traced_chain(kernel, False, options), traced_chain(kernel, True, options)
    if chain.asked.static:
        chain = replace(chain, ranges=dict.fromkeys(chain.layers, RANGES))
    weights = {
        name: random_weight(format, layer.shape, seed) for seed, (name, layer) in enumerate(chain.layers.items())
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = [
            (Path(folder) / lower(each, given, Path(folder)).file).stat().st_size
            for each, given in ((plain, {}), (chain, weights))
        ]
    form = STORES.form_of(next(iter(chain.layers.values())), Scheme(format), chain.options)
    find_bytes = KEY_BYTES if form.named_by_hash else PLACE_BYTES
    held = constants_bytes([spec.nbytes for spec in form.tensors()], find_bytes) + constants_bytes([4 * WIDTH])
    operators = (chain.operators - plain.operators) / LAYERS
    return {
        "found_bytes": (sizes[1] - sizes[0]) / LAYERS - held,
        "planned_bytes": form.operators_bytes() + OPERATOR_BYTES * operators,
    }


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "executorch_sizes.json")
    options = parser.parse_args()
    rows = {name: row(*case) for name, case in CASES.items()}
    for name, found in rows.items():
        print(f"{name:28} {found['found_bytes']:8.0f} of {found['planned_bytes']:6.0f}")
    write_json(options.out, {"executorch": __version__, "layers": LAYERS, "width": WIDTH, "rows": rows})


if __name__ == "__main__":
    main()
