# SPDX-License-Identifier: Apache-2.0
"""From a PyTorch component to an ML program without layer weights, in which every layer is one operation.

The value that a layer computes is named by the layer's module path, dots as underscores, so that a checker finds it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ....runtimes.coreml.file.blobs import BlobFile
from ....runtimes.coreml.file.dtypes import TensorType
from ....runtimes.coreml.interface import layer_value
from ...checkpoint.card import ModelCard
from ...families.graphs import Component
from ...target_options import Deployment
from ..layer import kind_of, require_own_weights
from .form import MilLayer
from .mil import Message, const, is_constant, operation, read_names, stored, string, tensor_type, type_of

LAYER = "turbopocket_layer"
"""Type of a layer's operation in a skeleton."""

PATH = "path"
"""Its parameter, in a skeleton its attribute, that holds the module path."""


@dataclass(frozen=True)
class TracedProgram:
    """A component's program without layer weights.

    `layers` are the compressible ones by their full name, in the order in which they run; `rest` holds the values of
    all other stored tensors, whose number in the list stands in the program in the place of an offset.
    """

    component: str
    deployment: Deployment
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]
    operations: list[Message]
    layers: dict[str, MilLayer]
    rest: list[NDArray[Any]]
    rest_types: list[TensorType]
    max_package_bytes: int
    card: ModelCard


@dataclass
class Skeleton:
    """The operations of a converted program on their way to a TracedProgram."""

    component: str
    operations: list[Message]
    outputs: Mapping[str, TensorType]
    layers: dict[str, MilLayer] = field(default_factory=dict)
    rest: list[NDArray[Any]] = field(default_factory=list)
    rest_types: list[TensorType] = field(default_factory=list)

    def take_blobs(self, file: BlobFile | None) -> None:
        """Copies stored constants out of coremltools' weight file; their numbers take the place of offsets."""
        if file is None:
            return
        for op in self.operations:
            value = op.attributes["val"] if op.type == "const" else None
            if value is not None and value.HasField("blobFileValue"):
                tensor = type_of(value.type)
                array = np.array(file.read(value.blobFileValue.offset, tensor))
                value.CopyFrom(stored(tensor, self.add_rest(tensor, array)))

    def add_rest(self, tensor: TensorType, array: NDArray[Any]) -> int:
        """The number of a stored tensor that is not a layer's."""
        self.rest.append(array)
        self.rest_types.append(tensor)
        return len(self.rest) - 1

    def take_layers(self) -> None:
        """Finds the layers: their shapes and geometry move from constants to `layers`, outputs are named by path."""
        written = {op.outputs[0].name: op.attributes["val"] for op in self.operations if op.type == "const"}
        uses: dict[str, int] = {}
        renamed: dict[str, str] = {}
        for op in self.operations:
            if op.type != LAYER:
                continue
            path = _argument(op, PATH, written).immediateValue.tensor.strings.values[0]
            uses[path] = uses.get(path, 0) + 1
            renamed[op.outputs[0].name] = layer_value(path, uses[path])
            self.layers.setdefault(path, self._layer(path, op, written))
            for parameter in (PATH, "weight_shape", "geometry"):
                if parameter in op.inputs:
                    del op.inputs[parameter]
            op.attributes[PATH].CopyFrom(string(path))
        self.operations = used_only(self.operations, self.outputs)
        _rename(self.operations, renamed)
        for output, tensor in self.outputs.items():
            if output in renamed:
                self.operations.append(operation("identity", output, tensor, {"x": renamed[output]}))

    def _layer(self, path: str, op: Message, written: Mapping[str, Message]) -> MilLayer:
        shape = tuple(_numbers(_argument(op, "weight_shape", written)))
        geometry = tuple(_numbers(_argument(op, "geometry", written))) if "geometry" in op.inputs else ()
        wide = type_of(op.outputs[0].type).dtype.name == "FLOAT32"
        return MilLayer(f"{self.component}.{path}", kind_of(shape), shape, geometry, wide)

    def add_zero_biases(self) -> None:
        """Gives every Linear without bias one of zeros, as coremltools does, shared by all of the same width.

        Those with a bias find one as well, for forms that add their bias later.
        """
        zeros: dict[str, Message] = {}
        for layer in self.layers.values():
            if layer.kind == "linear":
                name = zero_bias(layer)
                tensor = tensor_type(layer.float_type, layer.shape[:1])
                if name not in zeros:
                    index = self.add_rest(tensor, np.zeros(tensor.shape, tensor.dtype.numpy))
                    zeros[name] = const(name, stored(tensor, index))
        self.operations[:0] = zeros.values()

    def share_constants(self) -> None:
        """Keeps one of all equal constants that are written into the program, and none that nobody reads."""
        kept: dict[bytes, str] = {}
        renamed: dict[str, str] = {}
        operations = []
        for op in self.operations:
            if op.type == "const" and op.attributes["val"].HasField("immediateValue"):
                name = op.outputs[0].name
                value = op.attributes["val"].SerializeToString(deterministic=True)
                renamed[name] = kept.setdefault(value, name)
                if renamed[name] != name:
                    continue
            operations.append(op)
        _rename(operations, renamed)
        self.operations = operations


def zero_bias(layer: MilLayer) -> str:
    """Name of the bias of zeros for a Linear."""
    return f"zeros_{layer.shape[0]}_{layer.float_type.lower()}"


def used_only(operations: Sequence[Message], outputs: Iterable[str]) -> list[Message]:
    """The operations without constants that nothing reads."""
    read = {name for op in operations for name in read_names(op)} | set(outputs)
    return [op for op in operations if not is_constant(op) or op.outputs[0].name in read]


def compressible_paths(component: Component) -> dict[int, str]:
    """Module path of every Linear and Conv2d by the `id` of its weight.

    Raises TurbopocketError when such a weight is another parameter as well.
    """
    require_own_weights(component)
    modules = component.module.model.named_modules()
    return {id(module.weight): path for path, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}


def _argument(op: Message, parameter: str, written: Mapping[str, Message]) -> Message:
    return written[op.inputs[parameter].arguments[0].name]


def _numbers(value: Message) -> list[int]:
    return list(value.immediateValue.tensor.ints.values)


def _rename(operations: Sequence[Message], renamed: Mapping[str, str]) -> None:
    """Renames values; one that stands in the way of a new name makes room."""
    taken = set(renamed.values()) - set(renamed)
    outputs = [output for op in operations for output in op.outputs]
    final = {output.name: f"{output.name}_value" for output in outputs if output.name in taken} | dict(renamed)
    for op in operations:
        for output in op.outputs:
            output.name = final.get(output.name, output.name)
        op.attributes["name"].CopyFrom(string(op.outputs[0].name))
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.name in final:
                    binding.name = final[binding.name]
