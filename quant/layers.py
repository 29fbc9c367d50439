# SPDX-License-Identifier: Apache-2.0
"""What a layer is, and where its weight comes from when it runs.

A layer with a `WeightSource` is a Linear or Conv2d like any other: same names, same `state_dict`, and `weight` is its
weight in float32. But that is made when it is asked for and let go of after, so that a model takes the memory of one
layer. Its registered parameter is a stand-in of NaNs of the right shape, four bytes in all: shapes, types and exports
see a parameter, and whoever takes it for the weight finds out.
"""

import copy
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ground.errors import TurbopocketError
from ..ground.heap import give_back_freed
from ..ground.names import LayerName
from .formats import CompressedTensor

KEPT_BYTES = 256 * 2**20
"""Of weights in float32 that all sources together keep, first come, first served: a small model is made once, and of a
large one nothing is thrown out only to be made again in the next call, as the oldest would be."""
PASSING_BYTES = 2**30
"""Of weights made for one call and freed after it, until freed memory goes back to the system. Kept by the C library
it came to 4 GB in a build of SDXL with 1.6 GB in use; a call of its UNet takes as long as without (22.3 s)."""


def compressible_layers(component: str, module: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and every Conv2d with groups = 1, by name: `<component>.<module path>`."""
    return {str(LayerName(component, path)): layer for path, layer in module.named_modules() if is_compressible(layer)}


def is_compressible(layer: nn.Module) -> bool:
    """Whether it is a Linear, or a Conv2d with groups = 1."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def weight_of(name: str, layer: nn.Module) -> Tensor:
    """The weight of a compressible layer, float32; TurbopocketError naming any other module."""
    _require_compressible(name, layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def weight_shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    """The shape of its weight, which is not made for that; raises as `weight_of` does."""
    _require_compressible(name, layer)
    return tuple(_registered(layer).shape)


def _require_compressible(name: str, layer: nn.Module) -> None:
    if not is_compressible(layer):
        raise TurbopocketError(f"{name}: {type(layer).__name__} is not a Linear or a Conv2d with groups=1")


def output_without_bias(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What a Linear or Conv2d makes of `x` with another weight of its shape, and without its bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, None)
    return functional.linear(x, weight)


class WeightSource(ABC):
    """Where layers get one weight from; it does not change."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.stand_in = nn.Parameter(torch.full((1,) * len(shape), torch.nan).expand(shape), requires_grad=False)
        self._kept: nn.Parameter | None = None

    @abstractmethod
    def make(self) -> Tensor:
        """The weight in float32, made anew unless that takes nothing."""

    def __getstate__(self) -> dict[str, Any]:
        """What it is pickled as: another process makes its own weight, and keeps it or not."""
        return {**self.__dict__, "_kept": None}

    @property
    def takes_memory(self) -> bool:
        """Whether `make` gives a tensor of its own."""
        return True

    def dense(self) -> nn.Parameter:
        """The weight in float32, made or kept. It is not to be written to."""
        if self._kept is not None:
            return self._kept
        with torch.inference_mode(False), torch.no_grad():  # what is kept may have to do where gradients are taken
            weight = nn.Parameter(self.make(), requires_grad=False)
        if self.takes_memory and _KEPT.take(weight.nbytes):
            self._kept = weight
            weakref.finalize(self, _KEPT.give_back, weight.nbytes)
        elif self.takes_memory:
            _PASSING.count(weight.nbytes)
        return weight


class _Kept:
    """Counts what sources keep."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = RLock()  # a source may be collected while another is counted

    def take(self, nbytes: int) -> bool:
        with self._lock:
            if self.nbytes + nbytes > KEPT_BYTES:
                return False
            self.nbytes += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes -= nbytes


_KEPT = _Kept()


class _Passing:
    """Counts what is made and not kept."""

    def __init__(self) -> None:
        self.nbytes = 0

    def count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if self.nbytes >= PASSING_BYTES:
            self.nbytes = 0
            give_back_freed()


_PASSING = _Passing()


@dataclass(frozen=True)
class StoredIn:
    """A safetensors file, and the name of one tensor in it."""

    file: Path
    name: str


class TensorSource(WeightSource):
    """A tensor in the type in which it is stored, as a rule mapped from its file: float16 and bfloat16 are widened.

    `stored` is where they are in a file, unchanged, for processes that read them there themselves.
    """

    def __init__(self, values: Tensor, stored: StoredIn | None = None) -> None:
        super().__init__(tuple(values.shape))
        self.values, self.stored = values, stored

    @property
    def takes_memory(self) -> bool:
        return self.values.dtype != torch.float32

    def make(self) -> Tensor:
        return self.values.float()


class CompressedSource(WeightSource):
    """A stored weight, decompressed."""

    def __init__(self, stored: CompressedTensor) -> None:
        super().__init__(stored.shape)
        self.stored = stored

    def make(self) -> Tensor:
        weight = self.stored.format.decompress(self.stored)
        # Strides of dimensions of one element say which way a convolution is computed: those of any new tensor.
        return weight.flatten().view(weight.shape)


class _Sourced(nn.Module):
    """What a layer is beside a Linear or Conv2d while its weight has a source."""

    source: WeightSource

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """A plain layer, for libraries that make another layer of a layer's type."""
        return cls.__bases__[1](*arguments, **options)

    @property
    def weight(self) -> Tensor:
        """The source's, unless another parameter was put in the stand-in's place."""
        registered = _registered(self)
        return self.source.dense() if registered is self.source.stand_in else registered

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Sourced":
        for shared in (self.source, self.source.stand_in):
            memo[id(shared)] = shared
        twin: _Sourced = object.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Its class is made here, so that pickle does not find it by name."""
        return _new_sourced, (type(self).__bases__[1],), self.__dict__

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """`to`, `half` and the like change the weight itself."""
        materialise(self)
        return self._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


def _registered(layer: nn.Module) -> Tensor:
    registered = layer._parameters["weight"]
    assert registered is not None
    return registered


@functools.cache
def _sourced_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sourced{layer_class.__name__}", (_Sourced, layer_class), {})


def _new_sourced(layer_class: type[nn.Module]) -> nn.Module:
    """A layer that is yet to be told what it holds."""
    layer: nn.Module = object.__new__(_sourced_class(layer_class))  # type: ignore[arg-type]
    return layer


def set_source(layer: nn.Module, source: WeightSource) -> None:
    """From now on the layer, a Linear or Conv2d, gets its weight from there whenever it runs."""
    if not isinstance(layer, _Sourced):
        layer.__class__ = _sourced_class(type(layer))  # type: ignore[arg-type]
    layer.source = source  # type: ignore[assignment]
    layer._parameters["weight"] = source.stand_in


@contextmanager
def weight_from(layer: nn.Module, source: WeightSource) -> Iterator[None]:
    """While the block runs, the layer's weight comes from there; afterwards it is what it was."""
    before = layer.__class__, layer._parameters["weight"], layer.__dict__.get("source")
    set_source(layer, source)
    try:
        yield
    finally:
        layer.__class__, layer._parameters["weight"], was = before
        if was is None:
            del layer.__dict__["source"]
        else:
            layer.source = was


def materialise(module: nn.Module) -> None:
    """Afterwards every layer in it is a plain one that holds its weight in float32 itself and can be trained."""

    def own(layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)

    _make_plain(module, own)


def without_weights(module: nn.Module) -> nn.Module:
    """A copy that shares all tensors, whose layers are plain and hold stand-ins where theirs have sources.

    For what reads shapes alone, such as exporters.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    _make_plain(twin, _registered)
    return twin


def _make_plain(module: nn.Module, weight: Callable[[nn.Module], Tensor]) -> None:
    for layer in module.modules():
        if isinstance(layer, _Sourced):
            layer._parameters["weight"] = weight(layer)  # type: ignore[assignment]
            layer.__class__ = type(layer).__bases__[1]
            del layer.__dict__["source"]


def convolved_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Rows, or columns, that a convolution gives for so many; `padding` is that of one side, both have it."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
