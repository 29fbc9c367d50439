# SPDX-License-Identifier: Apache-2.0
"""8-bit weights and activations beside fp32: blocks of SDXL and `pocket-turbo`'s UNet, ONNX Runtime and ExecuTorch.

    python benchmarks/w8a8.py [--threads 1] [--blocks NAME ...] [--openvino] [--executorch] [--out ...]

Each block is lowered as a build lowers it, with random weights and the ranges of random inputs, since speed depends on
neither. All forms of a block run in turns in one process; the figure is the least processor time of a run, which others
on the machine disturb least, and of which only ratios are to be read. `--openvino` needs its wheel, which is no
dependency: its fp32 of our fp32 file, and its int8 of what ONNX Runtime's `quantize_static` (uint8 activations, int8
weights by channel; MatMul and Conv) makes of that. ExecuTorch's waiting threads do not sleep and are counted.

SDXL's UNet is projected: its blocks (residual ones by their products, in blocks of equal width) times what one
of that width takes. What is no block (time embedding, first and last convolution, sampling up and down) is left out.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import ExecuTorchOptions, OnnxOptions
from turbopocket.export.targets.base import Target
from turbopocket.export.targets.executorch.target import ExecuTorch
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.pocket.evaluate import write_json
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.ranges import Ranges
from turbopocket.runtimes.onnx.session import session_options

TEXT_TOKENS, TEXT_WIDTH, TIME_WIDTH, HEAD_WIDTH = 77, 2048, 1280, 64
SECONDS_A_FORM, LEAST_ROUNDS = 2.0, 4
Run = Callable[[], Any]


class TransformerBlock(ComponentModule):
    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        output: Tensor = self.model(hidden, encoder_hidden_states=text)
        return output


class ResidualBlock(ComponentModule):
    def forward(self, pixels: Tensor, time_embedding: Tensor) -> Tensor:
        output: Tensor = self.model(pixels, time_embedding)
        return output


@dataclass(frozen=True)
class Block:
    """What is measured: the component, and how often SDXL's UNet has it in pictures of some sizes."""

    make: Callable[[], Component]
    counts: Mapping[str, float]


def transformer(width: int, tokens: int) -> Component:
    """One block of that width, on so many tokens."""
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    model = BasicTransformerBlock(width, width // HEAD_WIDTH, HEAD_WIDTH, cross_attention_dim=TEXT_WIDTH).eval()
    inputs = {"hidden": torch.randn(2, tokens, width), "text": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH)}
    return Component("unet", TransformerBlock("unet", model), inputs, ("output",), role="denoiser")


def residual(width: int, side: int) -> Component:
    """One block of so many channels in and out, on side x side pixels."""
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    model = ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=TIME_WIDTH).eval()
    inputs = {"pixels": torch.randn(2, width, side, side), "time_embedding": torch.randn(2, TIME_WIDTH)}
    return Component("unet", ResidualBlock("unet", model), inputs, ("output",), role="denoiser")


def pocket() -> Component:
    """The UNet of `pocket-turbo`."""
    return next(each for each in components_of(load("pocket-turbo")) if each.role == "denoiser")


def in_equal_blocks(width: int, *inputs: int) -> float:
    """Products of residual blocks with so many channels in and `width` out, in blocks of `width` in."""
    equal = 18 * width
    return sum((9 * each + 9 * width + (each if each != width else 0)) / equal for each in inputs)


RESIDUAL_COUNTS = {
    320: in_equal_blocks(320, 320, 320, 960, 640, 640),
    640: in_equal_blocks(640, 320, 640, 1920, 1280, 960),
    1280: in_equal_blocks(1280, 640, 1280, 1280, 1280, 2560, 2560, 1920),
}
"""diffusers' UNet2DConditionModel with SDXL's config: down, middle, up."""

BLOCKS: dict[str, Block] = {
    "transformer 1280, 256 tokens": Block(lambda: transformer(1280, 256), {"512": 60}),
    "transformer 1280, 1024 tokens": Block(lambda: transformer(1280, 1024), {"1024": 60}),
    "residual 320, 64 x 64": Block(lambda: residual(320, 64), {"512": RESIDUAL_COUNTS[320]}),
    "residual 640, 32 x 32": Block(lambda: residual(640, 32), {"512": RESIDUAL_COUNTS[640]}),
    "residual 1280, 16 x 16": Block(lambda: residual(1280, 16), {"512": RESIDUAL_COUNTS[1280]}),
    "transformer 640, 1024 tokens": Block(lambda: transformer(640, 1024), {"512": 10}),
    "transformer 640, 4096 tokens": Block(lambda: transformer(640, 4096), {"1024": 10}),
    "residual 320, 128 x 128": Block(lambda: residual(320, 128), {"1024": RESIDUAL_COUNTS[320]}),
    "residual 640, 64 x 64": Block(lambda: residual(640, 64), {"1024": RESIDUAL_COUNTS[640]}),
    "residual 1280, 32 x 32": Block(lambda: residual(1280, 32), {"1024": RESIDUAL_COUNTS[1280]}),
    "pocket-turbo's UNet": Block(pocket, {}),
}
FORMS: dict[str, tuple[Target, str]] = {
    "onnx fp32": (Onnx(), "fp32"),
    "onnx static": (Onnx(OnnxOptions(activations="static")), "int8-row"),
    "onnx dynamic": (Onnx(OnnxOptions(activations="dynamic")), "int8-row"),
}
EXECUTORCH_FORMS: dict[str, tuple[Target, str]] = {
    "executorch fp32": (ExecuTorch(), "fp32"),
    "executorch static": (ExecuTorch(ExecuTorchOptions(activations="static")), "int8-row"),
    "executorch dynamic": (ExecuTorch(), "int8-row"),
}


def one_item(component: Component, seed: int) -> dict[str, Tensor]:
    """Inputs of one call: normal numbers, 500 for a timestep."""
    random = torch.Generator().manual_seed(seed)
    item = {name: value[:1] if value.ndim else value for name, value in component.example_inputs.items()}
    return {
        name: torch.full_like(value, 500) if name == "timestep" else torch.randn(value.shape, generator=random)
        for name, value in item.items()
    }


def ranges(component: Component) -> dict[str, Ranges]:
    """What the layers see in two calls."""

    @torch.no_grad()
    def run() -> None:
        for seed in (1, 2):
            component.module(*one_item(component, seed).values())

    return ranges_of(calibrate({component.name: component.module.model}, run))


def lowered(component: Component, forms: Mapping[str, tuple[Target, str]], folder: Path) -> dict[str, Path]:
    """The file of each form."""
    files, seen = {}, ranges(component)
    layers: Mapping[str, nn.Module] = compressible_layers(component.name, component.module.model)
    for name, (target, text) in forms.items():
        weights = {
            path: parse_format(text).compress(layer.weight.detach(), ABSMAX)  # type: ignore[arg-type]
            for path, layer in layers.items()
        }
        (folder / name).mkdir()
        spec = target.lower(target.fitted(target.trace(component), component, seen), weights, folder / name)
        files[name] = folder / name / spec.file
    return files


def onnx_runs(files: Mapping[str, Path], feeds: Mapping[str, Any], threads: int) -> dict[str, Run]:
    """A run of each file in ONNX Runtime. Waiting threads sleep, so that they are not counted."""
    import onnxruntime as ort

    options = session_options(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {name: ort.InferenceSession(str(path), options) for name, path in files.items()}
    return {name: lambda session=session: session.run(None, feeds) for name, session in sessions.items()}


def quantized_by_onnxruntime(path: Path, feeds: Mapping[str, Any], folder: Path) -> Path:
    """`quantize_static` of the file, as its documentation recommends for CPUs with VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([dict(feeds)])

        def get_next(self) -> Any:
            return next(self.left, None)

    out, ready = folder / "quantized.onnx", folder / "ready.onnx"
    apart = {"save_as_external_data": True, "all_tensors_to_one_file": True, "external_data_location": "ready.data"}
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True, **apart)
    quantize_static(
        *map(str, (ready, out)),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # its shape inference does not know MultiHeadAttention
    )
    return out


def openvino_runs(files: Mapping[str, Path], feeds: Mapping[str, Any], threads: int) -> dict[str, Run]:
    """A run of each file in OpenVINO."""
    import openvino

    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    core, runs = openvino.Core(), {}
    for name, path in files.items():
        request = core.compile_model(str(path), "CPU", config).create_infer_request()
        runs[name] = lambda request=request: request.infer(dict(feeds))
    return runs


def executorch_runs(files: Mapping[str, Path], feeds: Mapping[str, Any], threads: int) -> dict[str, Run]:
    """A run of each program."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch, _unsafe_reset_threadpool

    _unsafe_reset_threadpool(threads)
    tensors = [torch.from_numpy(value) for value in feeds.values()]
    programs = {name: _load_for_executorch(str(path)) for name, path in files.items()}
    return {name: lambda program=program: program.forward(tensors) for name, program in programs.items()}


def least_ms(runs: Mapping[str, Run]) -> dict[str, float]:
    """Least processor time of a run of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    spent = 0.0
    while spent < SECONDS_A_FORM * len(runs) or len(next(iter(taken.values()))) < LEAST_ROUNDS:
        for name, run in runs.items():
            start = time.process_time()
            run()
            taken[name].append(1000 * (time.process_time() - start))
            spent += taken[name][-1] / 1000
    return {name: min(each) for name, each in taken.items()}


def measured(block: Block, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of each form of a block, and how many times as fast as its runtime's fp32 that is."""
    component = block.make()
    feeds = {name: value.numpy() for name, value in one_item(component, 3).items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = lowered(component, FORMS, folder)
        files["quantize_static"] = quantized_by_onnxruntime(files["onnx fp32"], feeds, folder)
        runs = onnx_runs(files, feeds, options.threads)
        if options.openvino:
            theirs = {"openvino fp32": files["onnx fp32"], "openvino int8": files["quantize_static"]}
            runs |= openvino_runs(theirs, feeds, options.threads)
        if options.executorch:
            runs |= executorch_runs(lowered(component, EXECUTORCH_FORMS, folder), feeds, options.threads)
        taken = least_ms(runs)
    return {"ms": taken, "times_as_fast_as_fp32": dict(ratios(taken))}


def ratios(taken: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Of each form to its own runtime's fp32."""
    for name, own in taken.items():
        runtime = "onnx" if name == "quantize_static" else name.split()[0]
        yield name, taken[f"{runtime} fp32"] / own


def projected(results: Mapping[str, Any]) -> dict[str, Any]:
    """SDXL's UNet, for sizes of which all blocks were measured."""
    found = {}
    for size in ("512", "1024"):
        counts = {name: block.counts[size] for name, block in BLOCKS.items() if size in block.counts}
        if not counts.keys() <= results.keys():
            continue
        own = [results[name]["ms"] for name in counts]
        forms = [form for form in own[0] if all(form in each for each in own)]
        seconds = {form: sum(counts[name] * results[name]["ms"][form] for name in counts) / 1000 for form in forms}
        found[size] = {"seconds": seconds, "times_as_fast_as_fp32": dict(ratios(seconds)), "blocks": counts}
    return found


def cpu() -> dict[str, Any]:
    """What the processor is, as far as integers go."""
    info = Path("/proc/cpuinfo").read_text()
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    wanted = "avx2", "avx_vnni", "avx512_vnni", "amx_int8"
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {"model": name, "machine": platform.machine(), "has": [each for each in wanted if each in flags]}


def main() -> None:
    """Measures block by block, and writes the JSON after each; results of other numbers of threads in it are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS))
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--executorch", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "w8a8.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    results = kept.get(f"{options.threads} threads", {}).get("blocks", {})
    for name in options.blocks:
        results[name] = measured(BLOCKS[name], options)
        print(name, json.dumps(results[name], indent=2), flush=True)
        own = {"cpu": cpu(), "blocks": results, "sdxl_unet": projected(results)}
        write_json(options.out, kept | {f"{options.threads} threads": own})


if __name__ == "__main__":
    main()
