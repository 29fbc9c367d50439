# SPDX-License-Identifier: Apache-2.0
"""What a layer's weight becomes in an ONNX graph: initializers and nodes, which follow from its shape and format.

ONNX Runtime folds operators whose inputs are all constant, which would turn a compressed weight into a dense one
in memory. Three things are never folded, and every form rests on one of them: kernels that read codes (MatMulNBits,
MatMulIntegerToFloat, QLinearConv), DequantizeLinear (kept by ONNX Runtime for its quantised patterns), and what depends
on one (`unfolded`) or on the layer's input. What is folded by design is small, but for 4-bit codes of the kernels that
multiply int8: these become int8 when the graph is loaded, a byte a weight.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from ....quant.formats import CompressedTensor
from ....quant.ranges import Ranges
from ...target_options import OnnxOptions
from ..layer import LayerBytes, LayerForm, LayerUse
from .data import StoredTensor, data_bytes, external_initializers
from .memory import INLINED_NODE_BYTES, NAMED_NODE_BYTES, PAGE_BYTES, TENSOR_BYTES
from .names import DOMAIN
from .steps import StepClock, StepColumn

Array = NDArray[Any]

_LARGE_OFFSET = 10**9
"""Has as many digits as any offset in a file that a phone can hold."""


MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

DEFAULTS = OnnxOptions()


@dataclass(frozen=True)
class FormOptions:
    """What the layers of one component have in common: what was asked of the target, and what calibration saw.

    `ranges` are by full layer name; calibrated scales are made of them. `clock` tells layers in PyTorch the timestep.
    """

    asked: OnnxOptions = DEFAULTS
    ranges: Mapping[str, Ranges] = field(default_factory=dict)
    clock: StepClock = field(default_factory=StepClock)


@dataclass(frozen=True)
class Form(LayerForm):
    """One layer in one scheme, as initializers and nodes."""

    options: FormOptions

    @abstractmethod
    def tensors(self) -> list[StoredTensor]:
        """The initializers."""

    @abstractmethod
    def arrays(self, weight: CompressedTensor) -> list[Array]:
        """The initializers' values."""

    def memory(self, use: LayerUse) -> LayerBytes:
        inputs = ["x", "weight", "bias"]
        node = helper.make_node(self.layer.kind, inputs, ["y"], name="y")
        named = sum(each.domain != DOMAIN for each in (*self.prepare(), *self.apply(node)))
        inlined = sum(len(function.node) for function in self.functions(node))
        tensors = [tensor for at, tensor in enumerate(self.tensors()) if at not in self.shared()]
        graph = NAMED_NODE_BYTES * named + INLINED_NODE_BYTES * inlined + TENSOR_BYTES * len(tensors)
        values = self.values_memory(use)
        return replace(values, held=values.held + graph)

    @abstractmethod
    def values_memory(self, use: LayerUse) -> LayerBytes:
        """What its numbers take of memory in one such call, in ONNX Runtime; nodes and tensors themselves are extra."""

    @property
    def mapped_bytes(self) -> int:
        """Of a weight that stays in its file, of which pages are in memory once it has run."""
        return int(self.format.nbytes(self.layer.shape)) + PAGE_BYTES * len(self.tensors())

    def require_calibrated(self) -> None:
        """Returns when everything is known that the nodes hold; else TurbopocketError."""
        return

    def constants(self) -> list[TensorProto]:
        """Small initializers that stand in the graph itself, named by their values: equal ones are there once."""
        return []

    def columns(self) -> list[StepColumn]:
        """Scales and zero points that the graph looks up by the timestep: `apply` reads the values that they name."""
        return []

    @abstractmethod
    def prepare(self) -> list[NodeProto]:
        """Nodes that read initializers only, once per layer."""

    @abstractmethod
    def apply(self, node: NodeProto) -> list[NodeProto]:
        """Nodes in the place of a traced one, bias included; the last has the traced one's name and output."""

    def once(self) -> GraphProto:
        """Small initializers, and nodes that read nothing else, which layers share: equal ones are there once."""
        return GraphProto()

    def value_shapes(self) -> list[ValueInfoProto]:
        """Shapes of values that ONNX Runtime can not infer."""
        return []

    def functions(self, node: NodeProto) -> list[FunctionProto]:
        """Bodies of operators of our own that `apply` uses for this traced node; the same for every layer alike."""
        return []

    def overhead_bytes(self, node: NodeProto) -> int:
        """Bytes that the traced `node` takes in both files beside `format.nbytes(shape)`; within a few digits.

        What it shares with other layers is not counted.
        """
        tensors = [tensor for at, tensor in enumerate(self.tensors()) if at not in self.shared()]
        graph = GraphProto(
            node=[*self.prepare(), *self.apply(node)],
            initializer=[*external_initializers(tensors, offset=_LARGE_OFFSET), *self.constants()],
            value_info=self.value_shapes(),
        )
        return graph.ByteSize() + data_bytes(tensors) - self.format.nbytes(self.layer.shape)

    def _value(self, part: str) -> str:
        return f"{self.layer.path}.{part}"

    def _tensor(self, part: str, dtype: int, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(self._value(part), dtype, shape)


def cast_to_fp32(source: str, target: str, name: str | None = None) -> NodeProto:
    """A Cast from value `source` to fp32 value `target`."""
    return helper.make_node("Cast", [source], [target], name=name, to=TensorProto.FLOAT)


def conv_of(node: NodeProto, weight: str) -> NodeProto:
    """The traced node as an ONNX Conv of that weight."""
    conv = helper.make_node("Conv", [node.input[0], weight, *node.input[2:]], node.output, name=node.name)
    conv.attribute.extend(node.attribute)
    return conv
