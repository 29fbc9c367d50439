# SPDX-License-Identifier: Apache-2.0
"""The parameters that are not layer weights: norms, biases, embeddings.

They are stored as they are: in fp16 when no value changes by that and the file gets smaller, else in fp32. An
embedding table stays fp16 in memory too, because its rows become fp32 only after they have been looked up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from .data import StoredTensor
from .form import Array, cast_to_fp32

_LEAST_HALVED = 128
"""Elements from which fp16 saves more bytes than the node that makes fp32 of it takes in the graph."""

_HALF = ".fp16"


@dataclass(frozen=True)
class RestParameter:
    """One parameter under its name in the graph; `is_table` when rows of it are looked up and nothing else."""

    name: str
    values: Tensor
    is_table: bool

    @property
    def is_half(self) -> bool:
        """True when fp16 holds every value exactly and is worth it; never for values that are not there (meta)."""
        values = self.values
        if values.numel() < _LEAST_HALVED or values.is_meta:
            return False
        return torch.equal(values.half().to(values.dtype), values)

    def stored(self) -> StoredTensor:
        """The parameter's initializer."""
        if self.is_half:
            return StoredTensor(self.name + _HALF, TensorProto.FLOAT16, tuple(self.values.shape))
        return StoredTensor(self.name, TensorProto.FLOAT, tuple(self.values.shape))

    def array(self) -> Array:
        """The initializer's values."""
        return self.values.detach().to(torch.float16 if self.is_half else torch.float32).numpy()


def rest_parameters(parameters: Mapping[str, Tensor], nodes: Iterable[NodeProto]) -> list[RestParameter]:
    """`parameters` (by name in the graph), with the use that these nodes make of them."""
    otherwise_used = {
        name for node in nodes for position, name in enumerate(node.input) if (node.op_type, position) != ("Gather", 0)
    }
    return [RestParameter(name, value, name not in otherwise_used) for name, value in parameters.items()]


def widened(parameters: Iterable[RestParameter]) -> list[NodeProto]:
    """Nodes that make fp32 of all fp16 parameters but tables; ONNX Runtime folds them when it loads the graph."""
    return [cast_to_fp32(p.name + _HALF, p.name) for p in parameters if p.is_half and not p.is_table]


def looked_up(node: NodeProto) -> list[NodeProto]:
    """A Gather from an fp32 table as one from an fp16 table, then fp32."""
    rows = f"{node.output[0]}/fp16"
    gather = helper.make_node("Gather", [node.input[0] + _HALF, *node.input[1:]], [rows], name=f"{node.name}/fp16")
    gather.attribute.extend(node.attribute)
    return [gather, cast_to_fp32(rows, node.output[0], node.name)]
