# SPDX-License-Identifier: Apache-2.0
"""Small packages: written by coremltools, or put together here byte by byte from the public format."""

import json
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from turbopocket.runtimes.coreml.file.constexpr import KINDS
from turbopocket.runtimes.coreml.file.dtypes import DTYPES
from turbopocket.runtimes.coreml.file.package import coremltools_module
from turbopocket.runtimes.coreml.file.program import Program

MIL = coremltools_module("proto.MIL_pb2")
Model = coremltools_module("proto.Model_pb2").Model
ct: Any = __import__("coremltools")
mb: Any = coremltools_module("converters.mil").Builder
types: Any = coremltools_module("converters.mil.mil").types
MODEL_PATH = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_PATH = "Data/com.apple.CoreML/weights/weight.bin"
_SHORT = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32, "bool": types.bool}


@contextmanager
def converting() -> Iterator[None]:
    """Without the warnings that converting itself raises, of PyTorch's tracer and of coremltools' temporary folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Implicitly cleaning up", category=ResourceWarning)
        yield


def save_built(
    path: Path,
    build: Callable[..., Any],
    inputs: Mapping[str, np.ndarray],
    target: str = "iOS18",
    passes: str = "EMPTY",
) -> Path:
    """The package of a MIL program: `build` gets a variable per input and returns the result(s)."""
    specs = [mb.TensorSpec(shape=value.shape, dtype=_SHORT[value.dtype.name]) for value in inputs.values()]
    names = list(inputs)
    program = _program(build, names, specs, getattr(ct.target, target))
    with converting():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            skip_model_load=True,
            pass_pipeline=getattr(ct.PassPipeline, passes),
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=getattr(ct.target, target),
        )
    model.save(str(path))
    return path


def _program(build: Callable[..., Any], names: Sequence[str], specs: Sequence[Any], target: Any) -> Any:
    """MIL reads the inputs' names from a function's signature, so one is made with these names."""
    scope: dict[str, Any] = {"build": build}
    exec(f"def main({', '.join(names)}): return build({', '.join(names)})", scope)
    return mb.program(input_specs=list(specs), opset_version=target)(scope["main"])


def convert_module(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], target: str = "iOS18", precision: str = "FLOAT32"
) -> Any:
    """coremltools' model of a module with one output `y`; both ends are float32."""
    with converting():
        traced = torch.jit.trace(module.eval(), tuple(inputs.values()))
        return ct.convert(
            traced,
            inputs=[ct.TensorType(name=name, shape=value.shape, dtype=np.float32) for name, value in inputs.items()],
            outputs=[ct.TensorType(name="y", dtype=np.float32)],
            convert_to="mlprogram",
            skip_model_load=True,
            compute_precision=getattr(ct.precision, precision),
            minimum_deployment_target=getattr(ct.target, target),
        )


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Values of any integer type in `bits` bits each, from the least significant bit up: one big number."""
    number = 0
    for place, value in enumerate(values.reshape(-1).tolist()):
        number |= (int(value) & (2**bits - 1)) << (bits * place)
    return number.to_bytes(-(-values.size * bits // 8), "little")


class Written:
    """A package put together by hand: a function of const, constexpr and other ops, and its weight file."""

    def __init__(self, opset: str = "CoreML8", version: int = 9) -> None:
        self.model = Model(specificationVersion=version)
        self.function = self.model.mlProgram.functions["main"]
        self.model.mlProgram.version = 1
        self.function.opset = opset
        self.block = self.function.block_specializations[opset]
        self.blobs = bytearray(64)
        self.count = 0

    def type(self, dtype: str, shape: Sequence[int]) -> Any:
        """A MIL tensor type."""
        value = MIL.ValueType()
        value.tensorType.dataType = MIL.DataType.Value(dtype)
        value.tensorType.rank = len(shape)
        for size in shape:
            value.tensorType.dimensions.add().constant.size = size
        return value

    def blob(self, dtype: str, values: np.ndarray) -> Any:
        """A value in the weight file."""
        kind = DTYPES[dtype]
        data = pack_bits(values, kind.bits) if kind.bits < 8 else np.asarray(values, kind.numpy).tobytes()
        offset = len(self.blobs)
        spare = len(data) * 8 - values.size * kind.bits
        self.blobs += struct.pack("<IIQQQ", 0xDEADBEEF, kind.blob_code, len(data), offset + 64, spare).ljust(64, b"\0")
        self.blobs += data + bytes(-len(data) % 64)
        self.count += 1
        value = MIL.Value(type=self.type(dtype, values.shape))
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = offset
        return value

    def inline(self, dtype: str, values: Any) -> Any:
        """A value written out in the program."""
        array = np.asarray(values)
        value = MIL.Value(type=self.type(dtype, array.shape))
        tensor = value.immediateValue.tensor
        if dtype == "STRING":
            tensor.strings.values.append(str(values))
        elif dtype in ("INT32", "INT16", "UINT16"):
            tensor.ints.values.extend(int(each) for each in array.reshape(-1))
        elif dtype == "FLOAT32":
            tensor.floats.values.extend(float(each) for each in array.reshape(-1))
        elif dtype == "BOOL":
            tensor.bools.values.extend(bool(each) for each in array.reshape(-1))
        else:
            tensor.bytes.values = array.astype(DTYPES[dtype].numpy).tobytes()
        return value

    def op(
        self,
        kind: str,
        outputs: Mapping[str, tuple[str, Sequence[int]]],
        inputs: Mapping[str, Any],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds an op; an input is a name or a value."""
        operation = self.block.operations.add(type=kind)
        for name, (dtype, shape) in outputs.items():
            operation.outputs.add(name=name, type=self.type(dtype, shape))
        for name, given in inputs.items():
            argument = operation.inputs[name].arguments.add()
            if isinstance(given, str):
                argument.name = given
            else:
                argument.value.CopyFrom(given)
        for name, given in (attributes or {}).items():
            operation.attributes[name].CopyFrom(given)

    def ends(self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]) -> None:
        """Declares float32 inputs and outputs, in the function and in the description."""
        for name, shape in inputs.items():
            self.function.inputs.add(name=name, type=self.type("FLOAT32", shape))
        self.block.outputs.extend(outputs)
        for features, ends in ((self.model.description.input, inputs), (self.model.description.output, outputs)):
            for name, shape in ends.items():
                array = features.add(name=name).type.multiArrayType
                array.dataType = 65568
                array.shape.extend(shape)

    def save(self, path: Path) -> Path:
        """Writes the package."""
        (path / WEIGHTS_PATH).parent.mkdir(parents=True)
        (path / MODEL_PATH).write_bytes(self.model.SerializeToString(deterministic=True))
        struct.pack_into("<II", self.blobs, 0, self.count, 2)
        (path / WEIGHTS_PATH).write_bytes(bytes(self.blobs))
        items = {
            "model": {"author": "com.apple.CoreML", "name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"},
            "weights": {"author": "com.apple.CoreML", "name": "weights", "path": "com.apple.CoreML/weights"},
        }
        manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": "model"}
        (path / "Manifest.json").write_text(json.dumps(manifest))
        return path


def written_sum(x_shape: Sequence[int] = (2, 3)) -> Written:
    """y = x + w with w in the weight file and a compressed v that is added too."""
    written = Written()
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    table = np.array([0.5, -1.0, 2.0, 4.0], np.float32).reshape(1, 1, 4, 1)
    indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    written.op("const", {"w": ("FLOAT32", (2, 3))}, {}, {"val": written.blob("FLOAT32", weight)})
    written.op(
        "constexpr_lut_to_dense",
        {"v": ("FLOAT32", (2, 3))},
        {"indices": written.blob("UINT2", indices), "lut": written.blob("FLOAT32", table)},
    )
    written.op("add", {"s": ("FLOAT32", (2, 3))}, {"x": "x", "y": "w"})
    written.op("add", {"y": ("FLOAT32", (2, 3))}, {"x": "s", "y": "v"})
    written.ends({"x": x_shape}, {"y": (2, 3)})
    return written


def weights(program: Program) -> dict[str, np.ndarray]:
    """Every constant in the weight file and every compressed one, dense."""
    stored = [name for name, constant in program.function.constants.items() if constant.offset is not None]
    decoded = [name for op in program.function.operations if op.kind in KINDS for name in op.outputs]
    return {name: program.constant(name) for name in (*stored, *decoded)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The package of `written_sum`."""
    return written_sum().save(tmp_path / "small.mlpackage")


class Attentive(nn.Module):
    """Convolution, group norm, attention over pixels with a layer norm before it, upsampling, convolution."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.before = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels)
        self.conv_out = nn.Conv2d(channels, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All sizes are written out: coremltools 9 cannot convert sizes that are computed under numpy 2.4."""
        hidden = torch.nn.functional.silu(self.norm(self.conv_in(x)))
        tokens = self.before(hidden.reshape(1, 32, 64).transpose(1, 2))
        heads = [part(tokens).reshape(1, 64, 4, 8).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)]
        seen = torch.nn.functional.scaled_dot_product_attention(*heads)
        seen = seen.transpose(1, 2).reshape(1, 64, 32).transpose(1, 2).reshape(1, 32, 8, 8)
        return self.conv_out(torch.nn.functional.interpolate(hidden + seen, scale_factor=2.0))


@pytest.fixture(scope="session")
def attentive() -> tuple[Attentive, torch.Tensor]:
    """The net with fixed random weights, and an input."""
    torch.manual_seed(0)
    return Attentive(), torch.randn(1, 4, 8, 8)


def snr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal power over error power, in dB."""
    error = float(np.square(reference.astype(np.float64) - found).sum())
    return float("inf") if error == 0 else float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / error))
