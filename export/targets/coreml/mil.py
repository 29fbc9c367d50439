# SPDX-License-Identifier: Apache-2.0
"""Operations of an ML program as protobuf messages, built from names, types and numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ....runtimes.coreml.file.dtypes import DTYPES, TensorType
from ....runtimes.coreml.file.package import coremltools_module

WEIGHT_FILE = "@model_path/weights/weight.bin"

Message = Any
"""A protobuf message: coremltools' generated classes have no types."""


def tensor_type(dtype: str, shape: Sequence[int] = ()) -> TensorType:
    """The type of that name in the format (`FLOAT16`, `UINT4` …) and that shape."""
    return TensorType(DTYPES[dtype], tuple(shape))


def mil() -> Any:
    """The generated protobuf module of ML programs. TurbopocketError when coremltools is not installed."""
    return coremltools_module("proto.MIL_pb2")


def stored(tensor: TensorType, index: int) -> Message:
    """A value in the weight file, by its place in the list of the program's blobs: offsets come last, see `place`."""
    value = _typed(tensor)
    value.blobFileValue.fileName = WEIGHT_FILE
    value.blobFileValue.offset = index
    return value


def ints(values: int | Sequence[int], dtype: str = "INT32") -> Message:
    """Whole numbers written into the program; a single one is a scalar."""
    shape, numbers = ((), [values]) if isinstance(values, int) else ((len(values),), list(values))
    value = _typed(tensor_type(dtype, shape))
    if dtype == "INT32":
        value.immediateValue.tensor.ints.values.extend(numbers)
    else:
        size = DTYPES[dtype].bits // 8
        value.immediateValue.tensor.bytes.values = b"".join(number.to_bytes(size, "little") for number in numbers)
    return value


def string(text: str) -> Message:
    """A string written into the program."""
    value = _typed(tensor_type("STRING"))
    value.immediateValue.tensor.strings.values.append(text)
    return value


def const(name: str, value: Message) -> Message:
    """The operation that gives a stored or written value a name."""
    operation = mil().Operation(type="const")
    operation.attributes["name"].CopyFrom(string(name))
    operation.attributes["val"].CopyFrom(value)
    operation.outputs.add(name=name, type=value.type)
    return operation


def operation(
    kind: str,
    name: str,
    output: TensorType,
    inputs: Mapping[str, str | Message],
    attributes: Mapping[str, Message] | None = None,
) -> Message:
    """An operation with one result of its own name; inputs are names of values, or values written in place."""
    message = mil().Operation(type=kind)
    message.attributes["name"].CopyFrom(string(name))
    for attribute, value in (attributes or {}).items():
        message.attributes[attribute].CopyFrom(value)
    for parameter, source in inputs.items():
        binding = message.inputs[parameter].arguments.add()
        if isinstance(source, str):
            binding.name = source
        else:
            binding.value.CopyFrom(source)
    message.outputs.add(name=name, type=_typed(output).type)
    return message


def blobs_of(operation: Message) -> Iterable[Message]:
    """Every value of the operation that lies in the weight file, in a fixed order of parameters."""
    for attribute in sorted(operation.attributes):
        if operation.attributes[attribute].HasField("blobFileValue"):
            yield operation.attributes[attribute]
    for parameter in sorted(operation.inputs):
        for binding in operation.inputs[parameter].arguments:
            if binding.HasField("value") and binding.value.HasField("blobFileValue"):
                yield binding.value


def read_names(operation: Message) -> Iterable[str]:
    """Names of the values that the operation reads."""
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.name:
                yield binding.name


def type_of(message: Message) -> TensorType:
    """The tensor type that a ValueType message of a fixed shape declares."""
    tensor = message.tensorType
    shape = [dimension.constant.size for dimension in tensor.dimensions]
    return tensor_type(mil().DataType.Name(tensor.dataType), shape)


def describe(message: Message, tensor: TensorType) -> None:
    """Makes an empty ValueType message say that type; `type_of` reads it."""
    message.tensorType.dataType = mil().DataType.Value(tensor.dtype.name)
    message.tensorType.rank = len(tensor.shape)
    for size in tensor.shape:
        message.tensorType.dimensions.add().constant.size = size


def is_constant(operation: Message) -> bool:
    """Whether the operation reads no value: const or constexpr."""
    return operation.type == "const" or operation.type.startswith("constexpr_")


def _typed(tensor: TensorType) -> Message:
    value = mil().Value()
    describe(value.type, tensor)
    return value
