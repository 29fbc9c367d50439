# SPDX-License-Identifier: Apache-2.0
"""A program that also gives what its single layers compute: the shipped one, with more outputs.

XNNPACK shows nothing of what happens inside a delegate. But a delegate is a graph on disk, and a copy of any of its
values can be made another output of it and of the program. Everything else stays: the same constants from the same
file, the same operators in the same order.
"""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .imported import executorch_module

BACKEND = "XnnpackBackend"
_LAYERS = ("XNNFullyConnected", "XNNConv2d")
_FLOAT = "xnn_datatype_fp32"
_EXTERNAL_OUTPUT = 2
_ALIGNMENT = 16
_SCHEMA = "schema.fbs"


@dataclass(frozen=True)
class LayerName:
    """A layer's path in the component; a `pointwise` convolution runs as a Linear over pixels [B, H * W, C]."""

    path: str
    pointwise: bool = False

    def as_pytorch_has_it(self, value: NDArray[Any]) -> NDArray[Any]:
        """The layer's output with its channels where PyTorch has them: those of a convolution are last in XNNPACK."""
        return value.transpose(0, 3, 1, 2) if value.ndim == 4 and not self.pointwise else value


@dataclass
class Shown:
    """A program's bytes and the layers whose outputs follow its own, in that order."""

    program: bytes
    layers: list[LayerName]


def with_layer_outputs(program: bytes, layer_by_key: Mapping[str, LayerName]) -> Shown:
    """The program with one more output for each Linear and Conv2d, in order of execution.

    `layer_by_key` says which layer a weight belongs to, by the name of its constant: the SHA-256 of the bytes that it
    had when it was lowered. A layer that runs twice is shown twice.
    """
    files = executorch_module("exir._serialize._program")
    opened = files.deserialize_pte_binary(program)
    (plan,) = opened.program.execution_plan
    layers: list[LayerName] = []
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        delegate = plan.delegates[call.delegate_index] if hasattr(call, "delegate_index") else None
        if delegate is None or delegate.id != BACKEND:
            continue
        inline = opened.program.backend_delegate_data[delegate.processed.index]
        graph = _Graph.read(bytes(inline.data))
        for layer, value in graph.layer_outputs(layer_by_key):
            layers.append(layer)
            call.args.append(_add_output(plan, graph.shape(value)))
            graph.add_output(value)
        inline.data = graph.bytes()
    return Shown(bytes(files.serialize_pte_binary(opened, extract_delegate_segments=True)), layers)


def _add_output(plan: Any, shape: list[int]) -> int:
    """The index of a new float32 value of the plan, which is one of its outputs and has memory of its own."""
    schema = executorch_module("exir.schema")
    offset = -(-plan.non_const_buffer_sizes[1] // _ALIGNMENT) * _ALIGNMENT
    plan.non_const_buffer_sizes[1] = offset + 4 * math.prod(shape)
    place = schema.AllocationDetails(memory_id=1, memory_offset_low=offset % 2**32, memory_offset_high=offset // 2**32)
    like = next(each.val for each in plan.values if isinstance(each.val, schema.Tensor))
    tensor = schema.Tensor(
        scalar_type=executorch_module("exir.scalar_type").ScalarType.FLOAT,
        storage_offset=0,
        sizes=shape,
        dim_order=list(range(len(shape))),
        requires_grad=False,
        layout=0,
        data_buffer_idx=0,
        allocation_info=place,
        shape_dynamism=like.shape_dynamism,
    )
    plan.values.append(schema.EValue(tensor))
    plan.outputs.append(len(plan.values) - 1)
    return len(plan.values) - 1


@dataclass
class _Graph:
    """A delegate's graph, as flatc prints it."""

    values: dict[str, Any]
    tensors: dict[int, Any] = field(init=False)

    def __post_init__(self) -> None:
        tensors = [each["xvalue_union"] for each in self.values["xvalues"]]
        plain = [tensor.get("tensor_value", tensor) for tensor in tensors]
        self.tensors = {tensor["id_out"]: tensor for tensor in plain}

    @classmethod
    def read(cls, data: bytes) -> "_Graph":
        serialize = executorch_module("backends.xnnpack.serialization.xnnpack_graph_serialize")
        header = serialize.XNNHeader.from_bytes(data[: serialize.XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        with tempfile.TemporaryDirectory() as folder:
            schema, binary = _with_schema(Path(folder)), Path(folder) / "graph.bin"
            binary.write_bytes(data[start : start + header.flatbuffer_size])
            flatbuffer = executorch_module("exir._serialize._flatbuffer")
            flatbuffer._flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
            return cls(json.loads((Path(folder) / "graph.json").read_text()))

    def bytes(self) -> bytes:
        serialize = executorch_module("backends.xnnpack.serialization.xnnpack_graph_serialize")
        with tempfile.TemporaryDirectory() as folder:
            schema, text = _with_schema(Path(folder)), Path(folder) / "graph.json"
            text.write_text(json.dumps(self.values))
            executorch_module("exir._serialize._flatbuffer")._flatc_compile(folder, str(schema), str(text))
            graph = (Path(folder) / "graph.bin").read_bytes()
        head = serialize._aligned_size(serialize.XNNHeader.EXPECTED_LENGTH, _ALIGNMENT)
        body = serialize._aligned_size(len(graph), _ALIGNMENT)
        header = serialize.XNNHeader(head, len(graph), head + body, 0).to_bytes()
        return bytes(serialize._pad_to(header, head) + serialize._pad_to(graph, body))

    def layer_outputs(self, layer_by_key: Mapping[str, LayerName]) -> list[tuple[LayerName, int]]:
        """Layers that are known by their weights, each with the value it computes."""
        found = []
        for node in self.values["xnodes"]:
            if node["xnode_union_type"] in _LAYERS:
                weight = self.tensors[node["xnode_union"]["filter_id"]]
                key = self.values["constant_data"][weight["constant_buffer_idx"]]["named_key"]
                value = node["xnode_union"]["output_id"]
                layer = layer_by_key.get(key)
                if layer is not None and layer.pointwise:
                    real = value if self._is_float(value) else self._after(value, "XNNConvert")
                    value = self._after(self._after(real, "XNNStaticTranspose"), "XNNStaticReshape")
                if layer is not None and value is not None:
                    found.append((layer, value))
        return found

    def _after(self, value: int | None, kind: str) -> int | None:
        """What an operator of that kind makes of a value, None when there is none."""
        made = (each["xnode_union"] for each in self.values["xnodes"] if each["xnode_union_type"] == kind)
        return next((node["output_id"] for node in made if node["input_id"] == value), None)

    def _is_float(self, value: int) -> bool:
        return bool(self.tensors[value]["datatype"] == _FLOAT)

    def shape(self, value: int) -> list[int]:
        return list(self.tensors[value]["dims"])

    def add_output(self, value: int) -> None:
        """Makes a float copy of a value another output, the last of the graph's external values."""
        copy = {
            **self.tensors[value],
            "datatype": _FLOAT,
            "id_out": 1 + max(self.tensors),
            "external_id": self.values["num_externs"],
            "flags": _EXTERNAL_OUTPUT,
        }
        node = {"input_id": value, "output_id": copy["id_out"], "flags": 0}
        kind = "XNNConvert"
        if self._is_float(value):
            kind, node = "XNNStaticReshape", node | {"num_dims": copy["num_dims"], "new_shape": copy["dims"]}
        self.tensors[copy["id_out"]] = copy
        self.values["xvalues"].append({"xvalue_union_type": "XNNTensorValue", "xvalue_union": copy})
        self.values["xnodes"].append({"xnode_union_type": kind, "xnode_union": node})
        self.values["output_ids"].append(copy["id_out"])
        self.values["num_externs"] += 1


def _with_schema(folder: Path) -> Path:
    """XNNPACK's schema in the folder, with bits for floats: flatc prints six decimals of these, which loses scales."""
    schema = folder / _SCHEMA
    package = executorch_module("backends.xnnpack.serialization")
    text = resources.files(package).joinpath(_SCHEMA).read_text()
    schema.write_text(re.sub(r"\bfloat\b", "uint", text))
    return schema
