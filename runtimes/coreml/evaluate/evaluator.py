# SPDX-License-Identifier: Apache-2.0
"""Runs a program of a Core ML package on the CPU, in the arithmetic asked for, with PyTorch.

What is not known for certain is refused by name: an op, a parameter, a type. Every result's shape and type must be
what the program declares.
"""

from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....ground.arrays import Arrays
from ....ground.errors import TurbopocketError
from ...manifest import TensorSpec
from ...runner import check_inputs
from ..file.dtypes import LARGEST_FP16, SMALLEST_NORMAL_FP16, TensorType
from ..file.mil import Constant, Operation
from ..file.program import Program

# each module registers its ops when it is imported
from . import ops_elementwise, ops_image, ops_linear, ops_norm, ops_shape  # noqa: F401
from .arithmetic import Arithmetic, to_fp16
from .registry import OPS, Given, Op, as_tensor

Mode = Literal["fp32", "fp16", "acc16"]
"""`fp32`: every op in fp32, so that only stored and given values are rounded; `fp16`: results that the program
declares fp16 are rounded to it; `acc16`: sums are rounded too, every 64 terms, and so is what comes between the
steps of a compound op: the pessimistic end of what accelerators do."""
_MODES = ("fp32", "fp16", "acc16")
_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError, MemoryError)


@dataclass(frozen=True)
class OpStatistics:
    """What one op computed in a run: `name` is its first result's.

    `largest` is the largest magnitude before rounding to fp16; `bound`, for ops that add, the largest sum of
    magnitudes of terms: below 65504 no order of adding overflows fp16. `subnormal_share` is the share of numbers
    that are not zero but below fp16's smallest normal number, 6.1e-5.
    """

    name: str
    kind: str
    dtype: str
    largest: float
    bound: float | None
    non_finite: int
    subnormal_share: float

    @property
    def may_overflow(self) -> bool:
        """Whether the result, or some order of adding its terms, leaves fp16."""
        return not max(self.largest, self.bound or 0.0) <= LARGEST_FP16


class Evaluator:
    """Runs one program. `statistics` holds one record per computing op of the last run, if they were asked for."""

    def __init__(self, program: Program, mode: Mode = "fp32", statistics: bool = False) -> None:
        """TurbopocketError for a mode, an op or a parameter that is not known."""
        if mode not in _MODES:
            raise TurbopocketError(f"mode {mode!r} is not known: known are {', '.join(_MODES)}")
        self.program = program
        self.mode: Mode = mode
        self.statistics: list[OpStatistics] = []
        self._record = statistics
        self._ops = [_known(program, operation) for operation in program.operations]
        self._last_use = {
            value: step
            for step, operation in enumerate(program.operations)
            for values in operation.parameters.values()
            for value in values
            if isinstance(value, str)
        }

    @property
    def where(self) -> str:
        """The package's path, with which messages begin."""
        return self.program.where

    @property
    def inputs(self) -> list[TensorSpec]:
        """The program's inputs."""
        return self.program.inputs

    @property
    def outputs(self) -> list[TensorSpec]:
        """The program's outputs."""
        return self.program.outputs

    @property
    def values(self) -> KeysView[str]:
        """Names of everything that the program holds or computes."""
        return self.program.function.types.keys()

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        """The outputs by name, in their declared types, then the values named in `also`.

        Values in `also` come as they were computed: floats as float32 (in mode `fp32` unrounded), integers as int32.
        TurbopocketError for inputs of another name, type or shape, a name in `also` that the program does not
        have, and for an op that fails, by name.
        """
        program = self.program
        check_inputs(program.where, program.inputs, inputs)
        types = program.function.types
        if unknown := [name for name in also if name not in types]:
            raise TurbopocketError(f"{program.where} has no value {unknown[0]!r}")
        self.statistics = []
        with torch.inference_mode():
            values = self._run_ops(inputs, {*also, *program.function.outputs})
            outputs = {name: _as_declared(values[name], types[name]) for name in program.function.outputs}
            return outputs | {name: values[name].numpy() for name in also if name not in outputs}

    def _run_ops(self, inputs: Mapping[str, NDArray[Any]], kept: set[str]) -> dict[str, Tensor]:
        program = self.program
        values: dict[str, Tensor] = {}
        for name in program.function.inputs:
            given = as_tensor(np.array(inputs[name]))
            assert not isinstance(given, str)
            values[name] = given
        for step, (operation, known) in enumerate(zip(program.operations, self._ops, strict=True)):
            results = self._compute(operation, known, values)
            for name, result in zip(operation.outputs, results, strict=True):
                if name in self._last_use or name in kept:
                    values[name] = result
            for name in _names(operation):
                if self._last_use[name] == step and name not in kept:
                    values.pop(name, None)
        for name in kept - set(values):
            constant = as_tensor(program.constant(name))
            if isinstance(constant, str):
                raise TurbopocketError(f"{program.where}: {name} is a text")
            values[name] = constant
        return values

    def _compute(self, operation: Operation, known: Op, values: Mapping[str, Tensor]) -> list[Tensor]:
        declared = tuple(operation.outputs.values())
        rounds = self.mode != "fp32" and declared[0].dtype.name == "FLOAT16"
        run = Arithmetic(
            declared,
            from_end=self.program.opset in ("CoreML5", "CoreML6"),
            narrow=rounds and self.mode == "acc16",
            record=self._record and not known.moves,
        )
        place = f"{self.program.where}: op {operation.kind} {operation.name}"
        try:
            given = {
                parameter: [self._given(value, values) for value in stored]
                for parameter, stored in operation.parameters.items()
            }
            found = known.function(run, **known.arguments(given))
        except _ERRORS as error:  # PyTorch says with them that shapes or types do not fit
            raise TurbopocketError(f"{place}: {error}") from error
        except TurbopocketError as error:
            raise TurbopocketError(f"{place}: {error}", error.hint) from error
        results = found if isinstance(found, tuple) else (found,)
        if len(results) != len(declared):
            raise TurbopocketError(f"{place} declares {len(declared)} results, it has {len(results)}")
        checked = [_checked(place, result, tensor) for result, tensor in zip(results, declared, strict=True)]
        rounded = [to_fp16(result) if rounds and not known.moves else result for result in checked]
        if run.record:
            self.statistics.append(_statistics(operation, declared[0], checked, rounded, run.bound))
        return rounded

    def _given(self, value: str | Constant, values: Mapping[str, Tensor]) -> Given:
        if isinstance(value, str) and value in values:
            return values[value]
        return as_tensor(self.program.argument(value))


def _known(program: Program, operation: Operation) -> Op:
    place = f"{program.where}: op {operation.kind} {operation.name}"
    if operation.kind not in OPS:
        raise TurbopocketError(f"{place} is not known to this evaluator, which never guesses")
    known = OPS[operation.kind]
    if refused := known.refused(list(operation.parameters)):
        raise TurbopocketError(f"{place} {refused}")
    return known


def _names(operation: Operation) -> list[str]:
    return [value for values in operation.parameters.values() for value in values if isinstance(value, str)]


def _checked(place: str, result: Tensor, tensor: TensorType) -> Tensor:
    """The result, whose shape, kind and range are those declared; integers as int32."""
    kind = "float" if result.is_floating_point() else "bool" if result.dtype == torch.bool else "int"
    if tuple(result.shape) != tensor.shape or kind != tensor.dtype.kind:
        raise TurbopocketError(f"{place} is declared {tensor}, computed {kind} {list(result.shape)}")
    if kind == "int" and result.numel():
        limits = np.iinfo(np.int32 if tensor.dtype.name == "UINT32" else tensor.dtype.numpy)
        if result.min() < limits.min or result.max() > limits.max:
            raise TurbopocketError(f"{place} has numbers beyond {tensor.dtype.name}, which the format leaves open")
        return result.to(torch.int32)
    return result


def _statistics(
    operation: Operation, declared: TensorType, exact: list[Tensor], rounded: list[Tensor], bound: float | None
) -> OpStatistics:
    largest, non_finite, subnormal, count = 0.0, 0, 0, 0
    for before, after in zip(exact, rounded, strict=True):
        if not before.is_floating_point() or not before.numel():
            continue
        magnitude = before.abs()
        largest = max(largest, float(magnitude.max()))
        non_finite += int((~torch.isfinite(after)).sum())
        subnormal += int(((magnitude < SMALLEST_NORMAL_FP16) & (magnitude > 0)).sum())
        count += before.numel()
    share = subnormal / count if count else 0.0
    return OpStatistics(operation.name, operation.kind, declared.dtype.name, largest, bound, non_finite, share)


def _as_declared(value: Tensor, tensor: TensorType) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what fp16 cannot hold is infinite there
        return np.ascontiguousarray(value.numpy()).astype(tensor.dtype.numpy)
