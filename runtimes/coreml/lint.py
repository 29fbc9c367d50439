# SPDX-License-Identifier: Apache-2.0
"""What can be said about a Core ML package without a device: whether every part of it is what the format allows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ground.errors import TurbopocketError
from .file.blobs import BlobFile
from .file.dtypes import SMALLEST_NORMAL_FP16
from .file.mil import Constant, Operation
from .file.package import Package, coremltools_module, load_model, open_package
from .file.program import Program

UNVERIFIED = (
    "that Apple's compiler accepts it",
    "which compute unit runs which op",
    "memory and time to load, latency, energy",
    "rounding and accumulation of the device's fp16",
    "which compressed forms stay compressed while they run",
)
"""What no lint away from a device can tell."""
_OPSETS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}
_TARGETS = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}
_SHORT = {"FLOAT": "fp", "BOOL": "bool", "STRING": "string", "UINT": "uint", "INT": "int"}


@dataclass(frozen=True)
class LintReport:
    """Findings about one package: `errors` break what the format says, `warnings` are allowed and likely unwanted.

    `target` is the oldest system the package says it runs on; `not_verified_on_device` is always the same list.
    """

    package: Path
    target: str
    functions: tuple[str, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    not_verified_on_device: tuple[str, ...] = UNVERIFIED

    @property
    def passed(self) -> bool:
        """Whether there is no error."""
        return not self.errors


def lint(package: Path) -> LintReport:
    """Everything that can be found wrong in the files of `package`; a package too broken to open is one error.

    TurbopocketError only when coremltools, whose table of ops is the reference, is not installed.
    """
    coremltools_module("proto.Model_pb2")
    try:
        opened = open_package(package)
        model = load_model(opened)
        names = sorted(model.mlProgram.functions)
        programs = [Program.open(package, name) for name in names] or [Program.open(package)]
    except TurbopocketError as error:
        return LintReport(package, "unknown", (), (str(error),), ())
    version = model.specificationVersion
    errors = [*_version_errors(version, programs), *_file_errors(opened, programs)]
    warnings: list[str] = []
    for program in programs:
        target = _OPSETS.get(program.opset, 0)
        for operation in program.function.operations:
            errors += [
                f"op {operation.kind} {operation.name}: {found}" for found in _op_errors(program, operation, target)
            ]
        warnings += _value_warnings(program)
    warnings += _blob_warnings(programs)
    return LintReport(package, _TARGETS.get(version, "unknown"), tuple(names), tuple(errors), tuple(warnings))


def _version_errors(version: int, programs: list[Program]) -> Iterator[str]:
    if version not in _TARGETS:
        yield f"specification version {version} is not known: ML programs have {min(_TARGETS)} to {max(_TARGETS)}"
    for program in programs:
        opset = program.opset
        if opset not in _OPSETS:
            yield f"function {program.function.name} is written in {opset}: known are {', '.join(_OPSETS)}"
        elif _OPSETS[opset] > version:
            yield f"function {program.function.name} is written in {opset}, which needs version {_OPSETS[opset]}"


def _file_errors(package: Package, programs: list[Program]) -> Iterator[str]:
    """Files on disk that are not exactly the manifest, the model and the weight files that programs name."""
    used = {file.path for program in programs for file in program.weight_files}
    expected = {package.folder / "Manifest.json", package.model, *used}
    for path in sorted(package.folder.rglob("*")):
        name = path.relative_to(package.folder)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{name} is not a plain file"
        elif path.is_file() and path not in expected:
            yield f"{name} belongs to nothing in the package"
    for item in package.items:
        if item != package.model and not any(item == file or item in file.parents for file in used):
            yield f"the manifest's item {item.relative_to(package.folder)} holds nothing that a program names"
    for path in sorted(used):
        if not any(item == path or item in path.parents for item in package.items):
            yield f"{path.relative_to(package.folder)} is in no item of the manifest"
    for path in sorted(used):
        try:
            BlobFile(path).blobs()
        except TurbopocketError as error:
            yield str(error)


def _op_errors(program: Program, operation: Operation, target: int) -> Iterator[str]:
    """What coremltools' definition of the op, as of the target, does not allow."""
    definition = _definition(operation.kind, target)
    if definition is None:
        yield f"{_TARGETS.get(target, 'the opset')} has no such op"
        return
    inputs = definition.input_spec.input_types
    if missing := [name for name, spec in inputs.items() if not spec.optional and name not in operation.parameters]:
        yield f"has no {', '.join(missing)}"
    domains: dict[str, str] = {}
    for parameter, values in sorted(operation.parameters.items()):
        spec = inputs.get(parameter)
        if spec is None:
            yield f"{parameter} is not known to {_TARGETS[target]}: known are {', '.join(inputs)}"
            continue
        if spec.const and not all(isinstance(value, Constant) or program.is_constant(value) for value in values):
            yield f"{parameter} is computed, it must be stored"
        yield from _domain_errors(program, operation, parameter, _allowed(definition, spec))
        domain = getattr(spec, "type_domain_id", None)
        found = program.type_of(values[0]).dtype.name
        if domain is not None and domains.setdefault(domain, found) != found:
            yield f"{parameter} is {found} where another parameter of the same type is {domains[domain]}"


def _domain_errors(program: Program, operation: Operation, parameter: str, allowed: set[str]) -> Iterator[str]:
    for value in operation.parameters[parameter]:
        found = _short(program.type_of(value).dtype.name)
        if allowed and found not in allowed:
            yield f"{parameter} is {found}: allowed are {', '.join(sorted(allowed))}"


def _value_warnings(program: Program) -> Iterator[str]:
    """Written-out fp16 numbers that fp16 holds badly: epsilons, mostly."""
    for name, constant in program.function.constants.items():
        if constant.offset is None and constant.type.dtype.name == "FLOAT16":
            values = np.abs(constant.read().astype(np.float32))
            if not np.isfinite(values).all():
                yield f"const {name} is not finite in fp16"
            elif ((values > 0) & (values < SMALLEST_NORMAL_FP16)).any():
                yield f"const {name} is {values.max():.2e}, below fp16's smallest normal number 6.10e-05"


def _blob_warnings(programs: list[Program]) -> Iterator[str]:
    """Blobs that no function reads."""
    read: set[int | None] = set()
    for program in programs:
        read |= {constant.offset for constant in program.function.constants.values()}
        for operation in program.function.operations:
            for values in operation.parameters.values():
                read |= {value.offset for value in values if isinstance(value, Constant)}
    for path in sorted({file.path for program in programs for file in program.weight_files}):
        try:
            idle = [blob for blob in BlobFile(path).blobs() if blob.offset not in read]
        except TurbopocketError:  # said among the errors
            continue
        if idle:
            yield f"{path.name} has {len(idle)} blobs of {sum(blob.bytes for blob in idle)} bytes that nothing reads"


def _definition(kind: str, target: int) -> Any:
    """The newest definition of the op that is not newer than the target, or None."""
    registry = coremltools_module("converters.mil.mil.ops.registry").SSAOpRegistry
    versions = {version.value: definition for version, definition in registry.core_ops.get(kind, {}).items()}
    usable = [version for version in versions if version <= target]
    return versions[max(usable)] if usable else None


def _allowed(definition: Any, spec: Any) -> set[str]:
    """Short names of the types a parameter may have; empty when coremltools does not say."""
    types = coremltools_module("converters.mil.mil.types")
    domain = getattr(spec, "type_domain_id", None)
    listed = definition.type_domains.get(domain, ()) if domain is not None else getattr(spec, "type_domain", None)
    return {types.builtin_to_string(each) for each in listed or ()}


def _short(dtype: str) -> str:
    """coremltools' name of a type: fp16 for FLOAT16."""
    letters = dtype.rstrip("0123456789")
    return _SHORT[letters] + dtype[len(letters) :]
