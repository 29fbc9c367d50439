# SPDX-License-Identifier: Apache-2.0
"""One transformer block of SDXL at full width through VQDM, ONNX and ONNX Runtime: seconds, memory, parity.

    python benchmarks/sdxl_block.py [--format avq2x8-d8] [--out benchmarks/results/sdxl_block.json]

The block is one of those at 32 x 32 positions, which hold most of the UNet: width 1280, 20 heads, text of width 2048.
Weights are random, inputs too (the n-th principal direction of the tokens has energy 1 / n), so quality says nothing
here, and neither does the speed on a phone. Seconds of the fit are processor time on one thread. Memory is the largest
of the whole process, PyTorch included. The UNet's projected time is the block's per weight times SDXL's weights.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx import program as onnx
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import VQDM
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import SecondMoment
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.kernels.library import onnx_operators
from turbopocket.runtimes.manifest import Manifest
from turbopocket.runtimes.onnx.runner import OnnxRunner

WIDTH, HEADS, TEXT_WIDTH = 1280, 20, 2048
PIXELS, TEXT_TOKENS = 32 * 32, 77
CALIBRATION_RUNS = 4
UNET_WEIGHTS = 2_567_463_684
"""Parameters of SDXL's UNet."""
NAME = "block"


class Block(ComponentModule):
    """`hidden` (B, 1024, 1280) and `text` (B, 77, 2048) to (B, 1024, 1280)."""

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        output: Tensor = self.model(hidden, encoder_hidden_states=text)
        return output


def block() -> Component:
    """The block with PyTorch's own random weights."""
    torch.manual_seed(0)
    model = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=TEXT_WIDTH).eval()
    return Component(
        NAME, Block(NAME, model), dict(zip(("hidden", "text"), tokens(0, 2), strict=True)), ("output",), role="denoiser"
    )


def tokens(seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs of the block; see above."""
    random = torch.Generator().manual_seed(seed)
    sizes = ((PIXELS, WIDTH), (TEXT_TOKENS, TEXT_WIDTH))
    made = [torch.randn(batch, count, width, generator=random) for count, width in sizes]
    return made[0] * strengths(WIDTH), made[1] * strengths(TEXT_WIDTH)


def strengths(width: int) -> Tensor:
    """Root energies of so many directions."""
    return torch.arange(1, width + 1).rsqrt()


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="avq2x8-d8")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sdxl_block.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    component, form = block(), parse_format(options.format)
    model = component.module.model

    @torch.no_grad()
    def run() -> None:
        for seed in range(1, 1 + CALIBRATION_RUNS):
            component.module(*tokens(seed))

    stats = calibrate({NAME: model}, run)
    layers, weights, each = compressible_layers(NAME, model), {}, {}
    for name, layer in layers.items():
        start = time.process_time()
        weights[name] = form.compress(layer.weight, VQDM, stats[name][SecondMoment].hessian_KK)
        each[name] = {"shape": list(layer.weight.shape), "seconds": time.process_time() - start}
        print(name, each[name], flush=True)
    fitted = sum(layer.weight.numel() for layer in layers.values())
    seconds = sum(figures["seconds"] for figures in each.values())
    result: dict[str, Any] = {
        "format": str(form),
        "weights": fitted,
        "stored_bytes": sum(stored.nbytes for stored in weights.values()),
        "fit": {"seconds": seconds, "seconds_per_million": 1e6 * seconds / fitted, "each": each},
        "projected_unet_hours_on_one_thread": seconds / fitted * UNET_WEIGHTS / 3600,
        "peak_bytes_after_fit": peak_bytes(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = onnx.lower(onnx.trace(component), weights, folder)
        manifest = cast(Manifest, SimpleNamespace(components={NAME: spec}, name=NAME, plan=None))
        asked = dict(zip(component.example_inputs, tokens(99), strict=True))
        with decompressed({NAME: model}, weights), torch.no_grad():
            expected = component.module(*asked.values()).numpy()
        result["file_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for runtime, operators in (("onnxruntime", None), ("onnxruntime+kernels", onnx_operators())):
            if runtime != "onnxruntime" and operators is None:
                continue
            runner = OnnxRunner(folder, manifest, threads=1, operators=operators)
            arrays = {name: tensor.numpy() for name, tensor in asked.items()}
            found = runner.run(NAME, arrays)["output"]
            start = time.perf_counter()
            runner.run(NAME, arrays)
            result[runtime] = {
                "relative_error": relative_error(found, expected),
                "seconds_a_run": time.perf_counter() - start,
            }
    result["peak_bytes"] = peak_bytes()
    write_json(options.out, result)
    print(result)


if __name__ == "__main__":
    main()
