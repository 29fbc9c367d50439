# SPDX-License-Identifier: Apache-2.0
"""What the target ONNX made of a component, kept for whoever traces the same in this run of the tests.

Most of a build of a tiny model is tracing, and dozens of tests build the same one. What is kept is found by all that a
trace can see: the calls of PyTorch's functions that the component makes, on which tensors, and what these hold. (Layers
of a loaded model hold no weights while they are traced.) So a forward that a test has changed is traced anew, and so is
all within `traced_anew`.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from turbopocket.export.families.graphs import Component
from turbopocket.export.targets.base import Target
from turbopocket.export.targets.layer import require_own_weights
from turbopocket.export.targets.onnx.program import TracedGraph
from turbopocket.export.targets.onnx.target import Onnx

_PLAIN = (int, float, str, bool, type(None), slice, torch.Size, torch.dtype)
_kept = True


@contextmanager
def keeping_traces(folder: Path) -> Iterator[None]:
    """While the block runs, the target ONNX looks in `folder` before it traces, and keeps there what it traced."""
    honest = Onnx.trace
    Onnx.trace = _kept_in(folder, honest)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Onnx.trace = honest  # type: ignore[method-assign]


@contextmanager
def traced_anew() -> Iterator[None]:
    """While the block runs, nothing is looked for."""
    global _kept
    before, _kept = _kept, False
    try:
        yield
    finally:
        _kept = before


def _kept_in(folder: Path, honest: Any) -> Any:
    @wraps(honest)
    def trace(target: Onnx, component: Component) -> TracedGraph:
        if not _kept:
            return honest(target, component)
        require_own_weights(component)
        try:
            file = folder / f"{seen(target, component)}.pickle"
        except Exception:  # it says what is wrong better
            return honest(target, component)
        if file.is_file():
            kept: TracedGraph = pickle.loads(file.read_bytes())
            own = dict(component.module.named_parameters(remove_duplicate=False))
            return replace(kept, rest={name: own[f"{component.layer_prefix}{name}"] for name in kept.rest})
        traced: TracedGraph = honest(target, component)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_bytes(pickle.dumps(replace(traced, rest=dict.fromkeys(traced.rest))))  # by their names
        beside.replace(file)
        return traced

    return trace


def seen(target: Target, component: Component) -> str:
    """A hash of all that tracing the component for the target depends on."""
    component = component.without_weights()
    told = hashlib.sha256()
    for each in fields(target):
        told.update(f"{type(target).name}.{each.name}={getattr(target, each.name)!r}\n".encode())
    told.update(f"{component.name} {component.role} {component.output_names} {component.free}\n".encode())
    names = {}
    for name, tensor in _held(component):
        names[id(tensor)] = name
        told.update(f"{name} {_kind(tensor)}\n".encode())
        if not _is_stand_in(tensor):
            told.update(_values(tensor).encode())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), _Listening(told, names) as listening:
        inputs = [fake.from_tensor(value) for value in component.example_inputs.values()]
        for name, given in zip(component.example_inputs, inputs, strict=True):
            listening.name(given, name)
        told.update(listening.told(component.module(*inputs)).encode())
    return told.hexdigest()


def _held(component: Component) -> list[tuple[str, Tensor]]:
    return [
        *component.module.named_parameters(remove_duplicate=False),
        *component.module.named_buffers(remove_duplicate=False),
    ]


def _is_stand_in(tensor: Tensor) -> bool:
    """Whether it is what a layer without weights holds: one number for all."""
    return tensor.ndim > 0 and not any(tensor.stride()) and tensor.numel() > 1


def _values(tensor: Tensor) -> str:
    """A hash of what a tensor holds, if it holds something."""
    if isinstance(tensor, FakeTensor):
        return "made here"
    with unset_fake_temporarily():
        return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


class _Listening(TorchFunctionMode):
    """Tells each call of a function of PyTorch, with tensors by the names that they got here."""

    def __init__(self, told: Any, names: dict[int, str]) -> None:
        super().__init__()
        self._told, self._names, self._alive, self._calls = told, names, [], 0

    def name(self, tensor: Tensor, name: str) -> None:
        self._names[id(tensor)] = name
        self._alive.append(tensor)  # else its id is another's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        said = f"{getattr(func, '__qualname__', func)} {self.told(args)} {self.told(kwargs)}"
        self._calls += 1
        for index, value in enumerate(found if isinstance(found, list | tuple) else [found]):
            if isinstance(value, Tensor) and id(value) not in self._names:
                self.name(value, f"{self._calls}.{index}")
        self._told.update(f"{said} -> {self.told(found)}\n".encode())
        return found

    def told(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{self._names.get(id(value)) or _values(value)} {_kind(value)}"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self.told(each)}' for key, each in value.items())}}}"
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return f"[{', '.join(map(self.told, value))}]"
        return repr(value) if isinstance(value, _PLAIN) else str(type(value))
