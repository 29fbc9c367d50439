# SPDX-License-Identifier: Apache-2.0
"""One function of a saved Core ML package, opened and validated: its tensors, its ops, its stored weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ....ground.errors import TurbopocketError
from ...manifest import TensorSpec
from . import constexpr
from .blobs import BlobFile
from .dtypes import ARRAY_TYPES, TensorType
from .mil import Constant, Function, FunctionReader, Operation
from .package import load_model, open_package

_INTERFACE = {"FLOAT16": "float16", "FLOAT32": "float32", "INT32": "int32", "INT8": "int8"}
"""Types that a tensor at the edge of a model can have: the program's name and the manifest's."""
_DESCRIBED = {number: name for name, number in ARRAY_TYPES.items()}
_MAX_CHAIN = 8


class Program:
    """A validated function of a package. Weights stay in their file until asked for.

    `operations` are the ops that compute, in order; what a `const` or `constexpr_*` op says is a constant, read by
    `constant`.
    """

    def __init__(self, where: str, function: Function, spec_version: int, files: tuple[BlobFile, ...]) -> None:
        self.where = where
        self.function = function
        self.spec_version = spec_version
        self.weight_files = files
        self.operations = [operation for operation in function.operations if operation.kind not in constexpr.KINDS]
        self._decoded: dict[str, Operation] = {}
        chain: dict[str, int] = {}
        for operation in function.operations:
            if operation.kind in constexpr.KINDS:
                self._add_decoded(operation, chain)
        self.inputs = [self._spec("input", name, tensor) for name, tensor in function.inputs.items()]
        self.outputs = [self._spec("output", name, function.types[name]) for name in function.outputs]

    @classmethod
    def open(cls, package: Path, function: str | None = None) -> "Program":
        """The program of `package`; `function` chooses one of several, None the package's default.

        Reads the protobuf and every blob's header, no weights. TurbopocketError for anything missing, unknown or
        contradictory, with the package's name.
        """
        opened = open_package(package)
        model = load_model(opened)
        if model.WhichOneof("Type") != "mlProgram":
            raise TurbopocketError(f"{package} holds a {model.WhichOneof('Type')}, only ML programs are supported")
        functions = model.mlProgram.functions
        name = function or model.description.defaultFunctionName or "main"
        if name not in functions:
            raise TurbopocketError(f"{package} has no function {name!r}: it has {', '.join(sorted(functions))}")
        reader = FunctionReader(str(package), opened.model.parent)
        read = reader.function(name, functions[name])
        program = cls(str(package), read, model.specificationVersion, tuple(reader.files.values()))
        program._check_description(_described(model.description, name))
        return program

    @property
    def opset(self) -> str:
        """The operator set the function is written in, such as `CoreML8`."""
        return self.function.opset

    def is_constant(self, name: str) -> bool:
        """Whether the value is stored rather than computed."""
        return name in self.function.constants or name in self._decoded

    def constant(self, name: str) -> NDArray[Any]:
        """The stored value, dense; compressed ones are decoded anew by each call. May be a view of the file."""
        if name in self.function.constants:
            return self.function.constants[name].read()
        operation = self._decoded[name]
        return self._decode(operation)[list(operation.outputs).index(name)]

    def argument(self, value: str | Constant) -> NDArray[Any]:
        """The array of a parameter that must be stored: a constant in place or the name of one."""
        return value.read() if isinstance(value, Constant) else self.constant(value)

    def type_of(self, value: str | Constant) -> TensorType:
        """The declared type of a parameter."""
        return value.type if isinstance(value, Constant) else self.function.types[value]

    def _add_decoded(self, operation: Operation, chain: dict[str, int]) -> None:
        place = f"{self.where}: op {operation.kind} {operation.name}"
        depth = 1
        for parameter, values in operation.parameters.items():
            for value in values:
                if len(values) > 1 or (isinstance(value, str) and not self.is_constant(value)):
                    raise TurbopocketError(f"{place}: {parameter} is not one stored value")
                depth = max(depth, chain.get(value, 0) + 1) if isinstance(value, str) else depth
        if depth > _MAX_CHAIN:
            raise TurbopocketError(f"{place} is the {depth}th compression of one value: at most {_MAX_CHAIN}")
        chain.update(dict.fromkeys(operation.outputs, depth))
        self._decoded.update(dict.fromkeys(operation.outputs, operation))

    def _decode(self, operation: Operation) -> tuple[NDArray[Any], ...]:
        place = f"{self.where}: op {operation.kind} {operation.name}"
        first = {parameter: values[0] for parameter, values in operation.parameters.items()}
        try:
            values = {parameter: self.argument(value) for parameter, value in first.items()}
            types = {parameter: self.type_of(value) for parameter, value in first.items()}
            decoded = constexpr.decode(operation.kind, values, types)
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
            raise TurbopocketError(f"{place}: {error}") from error
        except TurbopocketError as error:
            raise TurbopocketError(f"{place}: {error}") from error
        declared = list(operation.outputs.items())
        if len(declared) != len(decoded):
            raise TurbopocketError(f"{place} declares {len(declared)} results, it has {len(decoded)}")
        for (name, tensor), array in zip(declared, decoded, strict=True):
            if array.shape != tensor.shape or array.dtype != tensor.dtype.numpy:
                raise TurbopocketError(
                    f"{place}: {name} is declared {tensor}, decoded {array.dtype} {list(array.shape)}"
                )
        return decoded

    def _spec(self, end: str, name: str, tensor: TensorType) -> TensorSpec:
        if tensor.dtype.name not in _INTERFACE or not name or 0 in tensor.shape:
            raise TurbopocketError(f"{self.where}: {end} {name!r} is {tensor}: allowed are {', '.join(_INTERFACE)}")
        return TensorSpec.model_validate(
            {"name": name, "dtype": _INTERFACE[tensor.dtype.name], "shape": list(tensor.shape)}
        )

    def _check_description(self, described: Mapping[str, Any]) -> None:
        """Returns when the model's description names the program's tensors, their types and shapes."""
        for end, specs in (("input", self.inputs), ("output", self.outputs)):
            features = {feature.name: feature.type for feature in described[end]}
            if sorted(features) != sorted(spec.name for spec in specs) or len(features) != len(described[end]):
                names = ", ".join(spec.name for spec in specs)
                raise TurbopocketError(
                    f"{self.where}: the description's {end}s are {', '.join(sorted(features))}; the program's {names}"
                )
            for spec in specs:
                self._check_feature(end, spec, features[spec.name])

    def _check_feature(self, end: str, spec: TensorSpec, feature: Any) -> None:
        form = feature.WhichOneof("Type")
        if form != "multiArrayType":
            raise TurbopocketError(f"{self.where}: {end} {spec.name} is an {form}, only arrays are supported")
        array = feature.multiArrayType
        dtype = _INTERFACE.get(_DESCRIBED.get(array.dataType, ""), f"type {array.dataType}")
        flexible = array.WhichOneof("ShapeFlexibility") is not None
        if dtype != spec.dtype or list(array.shape) != spec.shape or flexible:
            raise TurbopocketError(
                f"{self.where}: the description has {end} {spec.name} as {dtype} {list(array.shape)}"
                f"{' and flexible' if flexible else ''}, the program as {spec.dtype} {spec.shape}"
            )


def _described(description: Any, function: str) -> dict[str, Any]:
    """Input and output features of one function; a package with one function describes it at the top."""
    for entry in description.functions:
        if entry.name == function:
            return {"input": entry.input, "output": entry.output}
    return {"input": description.input, "output": description.output}
