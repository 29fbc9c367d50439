# SPDX-License-Identifier: Apache-2.0
"""Run as a script: SDXL's topology as Core ML packages, one stage in a process of its own; prints JSON.

`full CONFIGS OUT`: every component at full width, planned from the configs and written; layer weights are stand-ins, of
which only type and shape matter. `half CONFIGS OUT`: a UNet of half the width with random weights, its package, and
what PyTorch computes with the stored weights. `evaluate OUT`: what the package computes.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, LayerFormat, parse_format
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.coreml.interface import loop_spec, package_file, package_inputs
from turbopocket.runtimes.manifest import ComponentSpec

FORMATS = ["int4-g32", "int4-row", "int8-row", "lut4-r16", "fp16"]
BUDGET = "2.3GB"
HALF = {
    "block_out_channels": [160, 320, 640],
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 128,
    "projection_class_embeddings_input_dim": 6 * 128 + 640,
}
LATENT_SIZE = (64, 64)
HALF_FORMATS = {"linear": "lut4-r16", "conv2d": "int8-row"}


class StandIns(Mapping[str, CompressedTensor]):
    """A weight for every layer; layers of one shape and format share theirs, so that few are held."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, LayerFormat]) -> None:
        self.shapes, self.formats = shapes, formats
        self._one = cache(lambda shape, format: format.compress(torch.randn(shape), ABSMAX))

    def __getitem__(self, name: str) -> CompressedTensor:
        found: CompressedTensor = self._one(self.shapes[name], self.formats[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)


def full(configs: Path, out: Path) -> dict[str, Any]:
    from turbopocket.export.checkpoint.load import load_shapes
    from turbopocket.export.families.components import components_of
    from turbopocket.export.plan import plan
    from turbopocket.export.recipe import make_recipe
    from turbopocket.export.targets.coreml import program as coreml

    compress = {"formats": FORMATS, "budget": BUDGET}
    values = {"model": {"source": str(configs)}, "target": {"name": "coreml"}, "compress": compress}
    planned = plan(make_recipe(values, "test"))
    chosen = {name: parse_scheme(text) for name, text in planned.layers.items()}
    components = {}
    for component in components_of(load_shapes(str(configs)), all_states=False):
        fill_all_but_layers(component.module)
        traced = coreml.trace(component)
        schemes = {name: chosen[name] for name in traced.layers}
        shapes = {name: layer.shape for name, layer in traced.layers.items()}
        layers = sum(scheme.nbytes(shapes[name]) for name, scheme in schemes.items())
        spec = coreml.lower(traced, StandIns(shapes, {name: each.weight for name, each in schemes.items()}), out)
        files = {file: (out / file).stat().st_size for file in coreml.package_files(spec)}
        components[component.name] = {
            "layers": len(schemes),
            "planned_before_formats": coreml.fixed_bytes(traced, dict.fromkeys(chosen, frozenset(chosen.values())))
            + layers,
            "planned": coreml.lowered_bytes(traced, schemes),
            "packages": packages_of(files),
        }
    return {"plan_bytes": planned["total_bytes"], "components": components}


def fill_all_but_layers(module: nn.Module) -> None:
    """Random values in place of meta tensors; weights of Linear and Conv2d stay on the meta device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias" or not isinstance(part, nn.Linear | nn.Conv2d):
                setattr(part, name, nn.Parameter(torch.randn(parameter.shape)))


def packages_of(files: Mapping[str, int]) -> dict[str, int]:
    packages: dict[str, int] = {}
    for file, nbytes in files.items():
        name = file.split("/")[0]
        packages[name] = packages.get(name, 0) + nbytes
    return packages


def half(configs: Path, out: Path) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    from turbopocket.export.families.graphs import unet_component
    from turbopocket.export.targets.coreml import program as coreml
    from turbopocket.export.targets.coreml.stores import STORES

    torch.manual_seed(0)
    config = json.loads((configs / "unet" / "config.json").read_text()) | HALF
    unet = UNet2DConditionModel.from_config(config).eval()
    for parameter in unet.parameters():
        parameter.data.copy_(parameter.data.half())  # SDXL-Turbo's published numbers are fp16, biases and norms too
    component = unet_component(unet, LATENT_SIZE)
    started = time.process_time()
    traced = coreml.trace(component)
    traced_s = time.process_time() - started
    weights = {}
    for name, layer in traced.layers.items():
        format = parse_format(HALF_FORMATS[layer.kind])
        if STORES.storable(Scheme(format), layer.kind, layer.shape, traced.deployment) is not None:
            format = parse_format("fp16")
        parameter = component.module.get_parameter(f"{name}.weight")
        weights[name] = format.compress(parameter.detach(), ABSMAX)
        parameter.data.copy_(format.decompress(weights[name]))
    spec = coreml.lower(traced, weights, out)
    inputs = example(component.example_inputs)
    with torch.inference_mode():
        expected = component.module(*inputs.values())
    np.savez(out / "reference.npz", expected=expected, **inputs)
    return {
        "weights": sum(parameter.numel() for parameter in component.module.parameters()),
        "package_bytes": sum((out / file).stat().st_size for file in coreml.package_files(spec)),
        "planned": coreml.lowered_bytes(traced, {name: Scheme(weight.format) for name, weight in weights.items()}),
        "trace_cpu_s": round(traced_s, 1),
    }


def example(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One item for each input, of numbers that fp16 holds."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randn((1, *tensor.shape[1:]), generator=generator).half().float() for name, tensor in like.items()
    }
    times = {"timestep": torch.tensor(999.0), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]])}
    return {name: times.get(name, tensor) for name, tensor in inputs.items()}


def evaluate(out: Path) -> dict[str, Any]:
    from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
    from turbopocket.runtimes.coreml.file.program import Program

    stored = dict(np.load(out / "reference.npz"))
    expected = stored.pop("expected")
    program = Program.open(out / package_file("unet"))
    loop = loop_spec("unet", program.inputs, program.outputs)
    spec = ComponentSpec(file="Unet", inputs=list(program.inputs), outputs=list(program.outputs), loop=loop)
    (call,) = package_inputs(spec, stored)
    report: dict[str, Any] = {"operations": len(program.operations)}
    for mode in ("fp32", "fp16"):
        started = time.process_time()
        found = Evaluator(program, mode).run(call)["noise_pred"]  # type: ignore[arg-type]
        error = np.square(found.astype(np.float64) - expected).sum()
        report[mode] = {
            "snr_db": round(float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / error)), 1),
            "cpu_s": round(time.process_time() - started, 1),
        }
    return report


def main(stage: str, *folders: str) -> None:
    torch.set_num_threads(1)
    report = {"full": full, "half": half, "evaluate": evaluate}[stage](*map(Path, folders))  # type: ignore[operator]
    report["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
