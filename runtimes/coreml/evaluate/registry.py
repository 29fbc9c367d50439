# SPDX-License-Identifier: Apache-2.0
"""The table of ops: each is a function of typed parameters, found by its name in the format.

An op is `f(run: Arithmetic, x: Tensor, axes: list[int], …)`; a parameter's annotation says how the stored or computed
value is handed over, its default is the format's default, and parameters that `f` does not name are refused.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ....ground.errors import TurbopocketError

Results = Tensor | tuple[Tensor, ...]
Given = Tensor | str
"""A parameter's value: a tensor of float32, int32 or bool, or a text."""


@dataclass(frozen=True)
class Op:
    """A known op: its function, how each parameter is handed over, which must be there.

    `moves` marks ops that compute nothing: their results hold the numbers they were given.
    """

    function: Callable[..., Results]
    parameters: Mapping[str, Callable[[Sequence[Given]], Any]]
    required: frozenset[str]
    moves: bool

    def arguments(self, given: Mapping[str, Sequence[Given]]) -> dict[str, Any]:
        """The function's keyword arguments from values by name; ValueError for one of another kind."""
        return {name: self._hand_over(name, values) for name, values in given.items()}

    def refused(self, given: Sequence[str]) -> str | None:
        """What is wrong with the parameters' names, or None."""
        if unknown := sorted(set(given) - set(self.parameters)):
            return f"has the unknown parameter {unknown[0]}: known are {', '.join(self.parameters)}"
        if missing := sorted(self.required - set(given)):
            return f"has no {missing[0]}"
        return None

    def _hand_over(self, name: str, values: Sequence[Given]) -> Any:
        try:
            return self.parameters[name](values)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from error


OPS: dict[str, Op] = {}


def op(*names: str, moves: bool = False) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Registers a function as the op or ops of these names."""

    def register(function: Callable[..., Results]) -> Callable[..., Results]:
        listed = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        parameters = {parameter.name: _HANDING[parameter.annotation] for parameter in listed}
        required = frozenset(item.name for item in listed if item.default is inspect.Parameter.empty)
        OPS.update({name: Op(function, parameters, required, moves) for name in names})
        return function

    return register


def as_tensor(array: NDArray[Any]) -> Tensor | str:
    """A stored array as ops get it: float32, int32 (uint32 as int64), bool, or a scalar text."""
    match array.dtype.kind:
        case "U":
            return str(array.reshape(-1)[0]) if array.size == 1 else "\n".join(array.reshape(-1).tolist())
        case "f":
            return torch.from_numpy(array).float()
        case "b":
            return torch.from_numpy(array)
        case _ if array.dtype.name == "uint32":
            return torch.from_numpy(array).to(torch.int64)
        case _:
            return torch.from_numpy(array).to(torch.int32)


def _one(values: Sequence[Given]) -> Given:
    if len(values) != 1:
        raise ValueError(f"one value is expected, found {len(values)}")
    return values[0]


def _tensor(values: Sequence[Given]) -> Tensor:
    value = _one(values)
    if isinstance(value, str):
        raise ValueError(f"a tensor is expected, found the text {value!r}")
    return value


def _tensors(values: Sequence[Given]) -> list[Tensor]:
    return [_tensor([value]) for value in values]


def _text(values: Sequence[Given]) -> str:
    value = _one(values)
    if not isinstance(value, str):
        raise ValueError("a text is expected, found a tensor")
    return value


def _scalar(kind: Callable[[Any], Any], name: str) -> Callable[[Sequence[Given]], Any]:
    def hand_over(values: Sequence[Given]) -> Any:
        tensor = _tensor(values)
        if tensor.numel() != 1 or not _is(kind, tensor):
            raise ValueError(f"one {name} is expected, found {tensor.dtype} {list(tensor.shape)}")
        return kind(tensor.item())

    return hand_over


def _list(kind: Callable[[Any], Any], name: str) -> Callable[[Sequence[Given]], Any]:
    def hand_over(values: Sequence[Given]) -> Any:
        tensor = _tensor(values)
        if tensor.dim() > 1 or not _is(kind, tensor):
            raise ValueError(f"{name}s are expected, found {tensor.dtype} {list(tensor.shape)}")
        return [kind(value) for value in tensor.reshape(-1).tolist()]

    return hand_over


def _is(kind: Callable[[Any], Any], tensor: Tensor) -> bool:
    """Whether the tensor's type stands for `kind`; a float may be given as an integer."""
    if kind is bool:
        return tensor.dtype == torch.bool
    if kind is int:
        return tensor.dtype in (torch.int32, torch.int64)
    return tensor.dtype != torch.bool


_HANDING: dict[Any, Callable[[Sequence[Given]], Any]] = {
    Tensor: _tensor,
    Tensor | None: _tensor,
    list[Tensor]: _tensors,
    str: _text,
    int: _scalar(int, "integer"),
    int | None: _scalar(int, "integer"),
    float: _scalar(float, "number"),
    float | None: _scalar(float, "number"),
    bool: _scalar(bool, "boolean"),
    bool | None: _scalar(bool, "boolean"),
    list[int]: _list(int, "integer"),
    list[int] | None: _list(int, "integer"),
    list[bool]: _list(bool, "boolean"),
    list[bool] | None: _list(bool, "boolean"),
}


def require(holds: bool, found: str) -> None:
    """Returns when `holds`; TurbopocketError says what was found instead of what an op allows."""
    if not holds:
        raise TurbopocketError(found)
