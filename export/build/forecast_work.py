# SPDX-License-Identifier: Apache-2.0
"""What one call of a component takes, counted on tensors that know a shape: no weights, no numbers.

A call is of one picture. K columns of a layer's matrix view, N input vectors that it is shown in a call.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ...quant.layers import compressible_layers
from ..families.graphs import Component, Role, block_name
from .forecast_alive import Buffers


@dataclass(frozen=True)
class Work:
    """What there is to compute: `flops` of matrix products, `conv_flops` of convolutions, `bytes` that all other
    operators read and write, and how many `operators` there are of any kind."""

    flops: float = 0.0
    conv_flops: float = 0.0
    bytes: float = 0.0
    operators: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.conv_flops + other.conv_flops,
            self.bytes + other.bytes,
            self.operators + other.operators,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.conv_flops * times, self.bytes * times, self.operators * times)


NO_WORK = Work()


def total(works: Sequence[Work]) -> Work:
    """The sum."""
    return sum(works, NO_WORK)


@dataclass(frozen=True)
class LayerWork:
    """One layer: numbers of its `weight` [O, K], calls, N of all of them, numbers in and out, `fed`, which is equal for
    layers that are given the same tensor, and the moments at which its first call begins and its last one ends."""

    name: str
    shape: tuple[int, ...]
    columns: int
    vectors: int
    inputs: int
    outputs: int
    calls: int
    fed: int
    begins: int
    ends: int

    @property
    def weights(self) -> int:
        """How many numbers the weight has."""
        return self.columns * self.shape[0]

    @property
    def flops(self) -> float:
        """Of its matrix product, for all vectors of a call of the component."""
        return 2.0 * self.weights * self.vectors


@dataclass(frozen=True)
class BlockWork:
    """One block: its layers, its share of the work, bytes of tensors that go in and into no block before it, of what
    comes out, and of all that its operators make."""

    layers: tuple[LayerWork, ...]
    work: Work
    input_bytes: int
    output_bytes: int
    made_bytes: int


@dataclass(frozen=True)
class ComponentWork:
    """One call of a component.

    `peak_bytes` is the most that it holds of activations at any moment, with the layer's weight in float32 that runs;
    `returned_bytes` what it gives; `others_bytes` of the `others`, parameters in float32 that are no layer's weight,
    and `table_bytes` of those of them whose rows are looked up. `alive` are bytes of activations by moment.
    `norms` are its GroupNorms.
    """

    name: str
    role: Role
    work: Work
    blocks: Mapping[str, BlockWork]
    peak_bytes: int
    returned_bytes: int
    others: int
    others_bytes: int
    table_bytes: int
    norms: int
    alive: Sequence[int]

    @property
    def layers(self) -> tuple[LayerWork, ...]:
        """Of all blocks."""
        return tuple(layer for block in self.blocks.values() for layer in block.layers)

    @property
    def weights(self) -> int:
        """Numbers of all layers' weights."""
        return sum(layer.weights for layer in self.layers)


def component_work(component: Component, sides: Mapping[str, int]) -> ComponentWork:
    """Counts one call of a component whose modules are on the meta device, for one picture.

    `sides` are the sizes of its inputs' free dimensions, by their names.
    """
    examples = component.example_inputs.items()
    inputs = [_for_one(example, component.free.get(name, {}), sides) for name, example in examples]
    layers = compressible_layers(component.name, component.module.model)
    counter = _Counter(layers, component.blocks())
    with torch.no_grad(), counter.watching(), counter, _FusedAttention(counter):
        outputs = component.module(*inputs)
    returned = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    owned = {id(layer.weight) for layer in layers.values()}
    others = [each for each in component.module.parameters() if id(each) not in owned]
    modules = list(component.module.modules())
    blocks = {
        name: BlockWork(tuple(seen.layers.values()), seen.work, seen.input_bytes, seen.output_bytes, seen.made_bytes)
        for name, seen in counter.blocks.items()
    }
    return ComponentWork(
        component.name,
        component.role,
        counter.work,
        blocks,
        counter.peak_bytes,
        sum(map(_nbytes, returned)),
        len(others),
        sum(4 * each.numel() for each in others),
        sum(4 * each.weight.numel() for each in modules if isinstance(each, nn.Embedding)),
        sum(isinstance(each, nn.GroupNorm) for each in modules),
        counter.buffers.alive(),
    )


def _for_one(example: Tensor, free: Mapping[int, str], sides: Mapping[str, int]) -> Tensor:
    shape = [1, *example.shape[1:]] if example.ndim else []
    for index, side in free.items():
        shape[index] = sides[side]
    return torch.empty(shape, dtype=example.dtype, device="meta")


@dataclass
class _Block:
    layers: dict[str, LayerWork] = field(default_factory=dict)
    work: Work = NO_WORK
    input_bytes: int = 0
    output_bytes: int = 0
    made_bytes: int = 0


_aten = torch.ops.aten
_BY_VALUE = {_aten.silu, _aten.gelu, _aten.sigmoid, _aten.tanh, _aten.relu, _aten.add, _aten.sub, _aten.mul, _aten.div}
"""Operators that may write over their first input, where nothing reads it any more."""


class _Counter(TorchDispatchMode):
    """Adds up what operators do while it is entered, in all and by block, and follows what is held."""

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.work, self.held_bytes, self.peak_bytes = NO_WORK, 0, 0
        self.buffers = Buffers()
        self.blocks = {name: _Block() for name in blocks}
        self._layers, self._modules = layers, blocks
        self._inside: list[_Block] = []
        self._numbers: Any = WeakIdKeyDictionary()
        self._next = itertools.count()
        self._given: set[int] = set()
        self._began = 0
        self._which: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {id(each.untyped_storage()) for each in _tensors((args, kwargs))}
        made = [each for each in _tensors(result) if id(each.untyped_storage()) not in given]
        over = [self._which.get(each.untyped_storage()) for each in _tensors(args)]
        by_value = function._overloadpacket in _BY_VALUE
        self.note(_work_of(function, args, kwargs, result, bool(made)), made, over[0] if by_value and over else None)
        return result

    def note(self, work: Work, made: Sequence[Tensor], over: int | None = None) -> None:
        """Adds an operator's work, and what it gives; value by value from the tensor `over`, if it is told."""
        self.work = self.work + work
        for each in made:
            self._hold(each, over)
        for block in self._inside:
            block.work = block.work + work
            block.made_bytes += sum(map(_nbytes, made))

    def _hold(self, tensor: Tensor, over: int | None) -> None:
        storage = tensor.untyped_storage()
        self._take(storage.nbytes())
        which = self.buffers.come((tuple(tensor.shape), tensor.dtype), storage.nbytes(), over)
        self._which[storage] = which
        weakref.finalize(storage, self._let_go, which, storage.nbytes())

    def _let_go(self, which: int, nbytes: int) -> None:
        self.buffers.go(which)
        self._take(-nbytes)

    def _take(self, nbytes: int) -> None:
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, layers and blocks say when they begin and end."""
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_pre_hook(self._layer_begins(name)).remove)
                hooks.callback(layer.register_forward_hook(self._layer_ends(name)).remove)
            for name, block in self._modules.items():
                begins, ends = self._block_begins(name), self._block_ends(name)
                # Before those of layers, of which a block may be one.
                hooks.callback(block.register_forward_pre_hook(begins, with_kwargs=True, prepend=True).remove)
                hooks.callback(block.register_forward_hook(ends).remove)
            yield

    def _layer_begins(self, name: str) -> Callable[..., None]:
        def begin(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            self._began = self.buffers.now
            self._take(4 * layer.weight.numel())

        return begin

    def _layer_ends(self, name: str) -> Callable[..., None]:
        def end(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._take(-4 * layer.weight.numel())
            x, shape = inputs[0], tuple(layer.weight.shape)
            vectors = output[:, 0].numel() if isinstance(layer, nn.Conv2d) else x[..., 0].numel()
            columns, layers = layer.weight[0].numel(), self.blocks[block_name(name)].layers
            before = layers.get(name, LayerWork(name, shape, columns, 0, 0, 0, 0, self._number(x), self._began, 0))
            layers[name] = LayerWork(
                name,
                shape,
                columns,
                before.vectors + vectors,
                before.inputs + x.numel(),
                before.outputs + output.numel(),
                before.calls + 1,
                before.fed,
                before.begins,
                self.buffers.now,
            )

        return end

    def _number(self, x: Tensor) -> int:
        """The same for the same tensor, and for views of all of it."""
        storage = x.untyped_storage()
        if storage not in self._numbers:
            self._numbers[storage] = next(self._next)
        return int(self._numbers[storage])

    def _block_begins(self, name: str) -> Callable[..., None]:
        def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
            block = self.blocks[name]
            given = {self._number(each): each for each in _tensors((args, kwargs))}
            block.input_bytes += sum(_nbytes(each) for number, each in given.items() if number not in self._given)
            self._given |= given.keys()
            self._inside.append(block)

        return begin

    def _block_ends(self, name: str) -> Callable[..., None]:
        def end(_module: nn.Module, inputs: Any, output: Any) -> None:
            self._inside.pop()
            self.blocks[name].output_bytes += sum(map(_nbytes, _tensors(output)))

        return end


class _FusedAttention(TorchFunctionMode):
    """Attention as CPUs compute it, in one operator that holds no matrix of scores; tensors without numbers get the
    long way."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if kwargs and name in kwargs))[
            :3
        ]
        scores = query[..., 0].numel() * key.shape[-2]
        work = Work(flops=2.0 * scores * (query.shape[-1] + value.shape[-1]), operators=1)
        self._counter.note(work, ())
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def _work_of(function: Any, args: Any, kwargs: Any, result: Any, makes: bool) -> Work:
    packet = function._overloadpacket
    if packet in flop_registry:
        flops = float(flop_registry[packet](*args, **kwargs, out_val=result))
        if packet is torch.ops.aten.convolution:
            return Work(conv_flops=flops, operators=1)
        return Work(flops=flops, operators=1)
    if not makes:  # a view
        return Work(operators=1)
    moved = sum(map(_nbytes, (*_tensors((args, kwargs)), *_tensors(result))))
    return Work(bytes=moved, operators=1)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    return []


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
