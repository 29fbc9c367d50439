# SPDX-License-Identifier: Apache-2.0
"""ML programs as plain records: the protobuf read once, every name, type, shape and stored value checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ground.errors import TurbopocketError
from .blobs import BlobFile
from .dtypes import DTYPES, TensorType, as_values
from .package import coremltools_module, inside

_MODEL_PATH = "@model_path/"
_MAX_ELEMENTS = 2**31
_IMMEDIATE = {
    "floats": ("FLOAT32",),
    "ints": ("INT32", "INT16", "UINT16"),
    "bools": ("BOOL",),
    "strings": ("STRING",),
    "bytes": ("FLOAT16", "INT8", "INT4", "UINT32", "UINT8", "UINT6", "UINT4", "UINT3", "UINT2", "UINT1"),
}
"""The fields of a written-out value and the types that stand in them; `bytes` holds the packed form."""


@dataclass(frozen=True)
class Constant:
    """A stored value: its type, the function that reads it, and the offset of its blob if it lies in a weight file."""

    type: TensorType
    read: Callable[[], NDArray[Any]]
    offset: int | None = None


@dataclass(frozen=True)
class Operation:
    """One op: parameters are names of earlier values or constants written in place; a parameter may hold several."""

    kind: str
    parameters: Mapping[str, tuple[str | Constant, ...]]
    outputs: Mapping[str, TensorType]

    @property
    def name(self) -> str:
        """The name of its first result, by which reports call it."""
        return next(iter(self.outputs))


@dataclass(frozen=True)
class Function:
    """One function of a program in execution order; `types` has every value's type, `constants` those stored whole."""

    name: str
    opset: str
    inputs: dict[str, TensorType]
    outputs: tuple[str, ...]
    operations: list[Operation] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)


class FunctionReader:
    """Reads functions of one package; `where` begins its messages, `folder` is what `@model_path` stands for."""

    def __init__(self, where: str, folder: Path) -> None:
        self.where = where
        self.folder = folder
        self.files: dict[str, BlobFile] = {}
        self._type_names = coremltools_module("proto.MIL_pb2").DataType

    def function(self, name: str, message: Any) -> Function:
        """The function, in which every used value is defined before; TurbopocketError names the first that is not."""
        blocks = message.block_specializations
        if message.opset not in blocks:
            raise self._error(f"function {name} has no block of its opset {message.opset!r}")
        block = blocks[message.opset]
        if block.inputs:
            raise self._error(f"function {name} has a block with inputs, which programs of tensors do not have")
        inputs = {item.name: self._type(f"input {item.name}", item.type) for item in message.inputs}
        if len(inputs) != len(message.inputs):
            raise self._error(f"function {name} has two inputs of one name")
        function = Function(name, message.opset, inputs, tuple(block.outputs), types=dict(inputs))
        for operation in block.operations:
            self._add(function, operation)
        for output in function.outputs:
            if output not in function.types:
                raise self._error(f"output {output} of function {name} is computed nowhere")
        return function

    def _add(self, function: Function, message: Any) -> None:
        operation = self._operation(message)
        for parameter, values in operation.parameters.items():
            for value in values:
                if isinstance(value, str) and value not in function.types:
                    raise self._error(f"op {operation.kind} {operation.name}: {parameter} is {value!r}, not known yet")
        for output, tensor in operation.outputs.items():
            if output in function.types:
                raise self._error(f"value {output} is computed twice")
            function.types[output] = tensor
        if operation.kind == "const":
            function.constants[operation.name] = self._const(operation)
        else:
            function.operations.append(operation)

    def _operation(self, message: Any) -> Operation:
        kind = message.type
        outputs = {item.name: self._type(f"op {kind} {item.name}", item.type) for item in message.outputs}
        name = next(iter(outputs), "")
        if message.blocks:
            raise self._error(f"op {kind} {name} has inner blocks: control flow is not supported")
        if not outputs or len(outputs) != len(message.outputs) or "" in outputs:
            raise self._error(f"op {kind} {name or '(no name)'} must have results with names of their own")
        parameters: dict[str, tuple[str | Constant, ...]] = {}
        for parameter, argument in message.inputs.items():
            place = f"{parameter} of op {kind} {name}"
            parameters[parameter] = tuple(self._binding(place, binding) for binding in argument.arguments)
        # the older form of constexpr_* ops and of const keeps parameters in attributes
        for attribute, value in message.attributes.items():
            if attribute == "name":
                continue
            if attribute in parameters:
                raise self._error(f"op {kind} {name} has {attribute} as an input and as an attribute")
            parameters[attribute] = (self._value(f"{attribute} of op {kind} {name}", value),)
        if empty := [parameter for parameter, values in parameters.items() if not values]:
            raise self._error(f"op {kind} {name} has nothing for {empty[0]}")
        return Operation(kind, parameters, outputs)

    def _const(self, operation: Operation) -> Constant:
        values = operation.parameters.get("val", ())
        if len(values) != 1 or len(operation.parameters) != 1 or isinstance(values[0], str):
            raise self._error(f"const {operation.name} must have one value `val` and nothing else")
        if len(operation.outputs) != 1 or values[0].type != operation.outputs[operation.name]:
            declared = operation.outputs[operation.name]
            raise self._error(f"const {operation.name} is declared {declared}, its value is {values[0].type}")
        return values[0]

    def _binding(self, place: str, binding: Any) -> str | Constant:
        match binding.WhichOneof("binding"):
            case "name":
                return str(binding.name)
            case "value":
                return self._value(place, binding.value)
            case _:
                raise self._error(f"{place} is empty")

    def _value(self, place: str, value: Any) -> Constant:
        tensor = self._type(place, value.type)
        match value.WhichOneof("value"):
            case "blobFileValue":
                return self._stored(place, tensor, value.blobFileValue.fileName, value.blobFileValue.offset)
            case "immediateValue" if value.immediateValue.WhichOneof("value") == "tensor":
                values = self._immediate(place, tensor, value.immediateValue.tensor)
                return Constant(tensor, lambda: values)
            case _:
                raise self._error(f"{place} has no value that is a tensor")

    def _stored(self, place: str, tensor: TensorType, name: str, offset: int) -> Constant:
        if tensor.dtype.blob_code is None:
            raise self._error(f"{place} is {tensor.dtype.name}, which a weight file cannot hold")
        if name not in self.files:
            if not name.startswith(_MODEL_PATH):
                raise self._error(f"{place} is stored in {name!r}, which does not begin with {_MODEL_PATH}")
            self.files[name] = BlobFile(inside(self.folder, name.removeprefix(_MODEL_PATH), f"{self.where}: {place}"))
        file = self.files[name]
        try:
            file.check(offset, tensor)
        except TurbopocketError as error:
            raise self._error(f"{place}: {error}") from error
        return Constant(tensor, lambda: file.read(offset, tensor), offset)

    def _immediate(self, place: str, tensor: TensorType, message: Any) -> NDArray[Any]:
        form = message.WhichOneof("value")
        values = getattr(message, form).values if form is not None else ()
        if tensor.dtype.name not in _IMMEDIATE.get(form, ()):
            raise self._error(f"{place} is {tensor}, written as {form}")
        wanted = tensor.stored_bytes if form == "bytes" else tensor.elements
        if len(values) != wanted:
            raise self._error(f"{place} is {tensor} of {wanted} {form}, found {len(values)}")
        if form == "bytes":
            return as_values(np.frombuffer(bytearray(values), np.uint8), tensor)
        try:
            array = np.array(list(values), None if form == "strings" else tensor.dtype.numpy)
        except OverflowError as error:
            raise self._error(f"{place} is {tensor}: {error}") from error
        return array.reshape(tensor.shape)

    def _type(self, place: str, message: Any) -> TensorType:
        form = message.WhichOneof("type")
        if form != "tensorType":
            raise self._error(f"{place} is a {form or 'value without a type'}, only tensors are supported")
        tensor = message.tensorType
        if tensor.dataType not in self._type_names.values():
            raise self._error(f"{place} has the unknown dtype number {tensor.dataType}")
        name = self._type_names.Name(tensor.dataType)
        if name not in DTYPES:
            raise self._error(f"{place} has dtype {name}: supported are {', '.join(DTYPES)}")
        if any(dimension.WhichOneof("dimension") != "constant" for dimension in tensor.dimensions):
            raise self._error(f"{place} has a shape that varies, only fixed shapes are supported")
        shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
        if tensor.rank != len(shape):
            raise self._error(f"{place} has rank {tensor.rank} and {len(shape)} dimensions")
        found = TensorType(DTYPES[name], shape)
        if found.elements > _MAX_ELEMENTS or len(shape) > 16:
            raise self._error(f"{place} is {found}: at most {_MAX_ELEMENTS} values can be held")
        return found

    def _error(self, message: str) -> TurbopocketError:
        return TurbopocketError(f"{self.where}: {message}")
