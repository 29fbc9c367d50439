# SPDX-License-Identifier: Apache-2.0
"""The temporal information block of a denoiser: what depends on the timestep, and on nothing of the picture.

Huang et al., TFMQ-DM (2024, arXiv 2311.16503), section 4.1: the sinusoid and the time embedding h, and every projection
g_i that hands h(t) to a block. It is found by running the module on shapes and following which inputs each tensor comes
from, so it knows no names: SDXL's added text branch, which is summed into h, belongs to it, and PixArt's adaLN layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from ..ground.errors import TurbopocketError
from .layers import compressible_layers, weight_shape

META = torch.device("meta")


@dataclass(frozen=True)
class _Ref:
    """A tensor of a recorded run, by its number."""

    number: int


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer of the module, by its name."""

    name: str


@dataclass(frozen=True)
class _Operation:
    """A function of PyTorch, or a layer by name, with references in the place of tensors."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]

    @property
    def reads(self) -> Iterator[int]:
        for leaf in tree_flatten((self.args, dict(self.kwargs)))[0]:
            if isinstance(leaf, _Ref):
                yield leaf.number


@dataclass(frozen=True)
class TemporalBlock:
    """The layers that depend on the timestep alone, or feed those that do, in the order in which they run.

    Attributes:
        component: the denoiser's name, with which all layers' names begin.
        layers: all of them.
        ends: those whose outputs the rest of the model reads: g_i(h(t)), the temporal features.
        inputs: of the denoiser, those that the features depend on: the timestep, and whatever is added to its
            embedding.
        share: of the weights of the denoiser's layers.
    """

    component: str
    layers: tuple[str, ...]
    ends: tuple[str, ...]
    inputs: tuple[str, ...]
    share: float
    operations: tuple[_Operation, ...]
    given: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    def features(
        self, module: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs [B, D] of `ends` by name, for inputs of the shapes that the block was found with.

        Runs `layers`, with what they hold now, and between them what the denoiser does; parameters of no layer are read
        from `module`, the denoiser itself. Whatever else is in `inputs`, latents among it, is not looked at.
        Raises TurbopocketError for inputs of other shapes.
        """
        device = next(iter(inputs.values())).device
        values: dict[int, Tensor] = {}
        for name, number in self.given.items():
            if tuple(inputs[name].shape) != self.shapes[name]:
                found, known = list(inputs[name].shape), list(self.shapes[name])
                raise TurbopocketError(f"{self.component}: {name} of shape {found}, temporal features are of {known}")
            values[number] = inputs[name]
        found_ends: dict[str, Tensor] = {}

        def real(leaf: Any) -> Any:
            if isinstance(leaf, _Ref):
                return values[leaf.number]
            if isinstance(leaf, _Held):
                return _held(module, leaf.name).to(device)
            return device if leaf == META else leaf

        for each in self.operations:
            args, kwargs = tree_map(real, (each.args, dict(each.kwargs)))
            if isinstance(each.function, str):
                result = layers[each.function](*args, **kwargs)
                if each.function in self.ends:
                    found_ends[each.function] = result
            else:
                result = each.function(*args, **kwargs)
            made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
            values |= zip(each.results, made, strict=True)
        return {name: found_ends[name] for name in self.ends}


def temporal_block(
    component: str, module: nn.Module, inputs: Mapping[str, Tensor], latents: str, timestep: str, model: nn.Module
) -> TemporalBlock:
    """The temporal information block of a denoiser, `module`, whose layers are those of its `model`.

    `inputs` are tensors of the shapes it is called with, in order; nothing is computed with them. `latents` and
    `timestep` are the names of two of them. A denoiser without such a block has one without layers.
    """
    given = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=META) for name, tensor in inputs.items()}
    held = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    layers = compressible_layers(component, model)
    run = _Run(given, {id(tensor): name for name, tensor in held.items()}, latents, timestep)
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            run.watch(name, layer, hooks)
        with run:
            functional_call(module, held, tuple(given.values()))
    own = tuple(name for name in run.order if name in run.temporal)
    ends = tuple(name for name in own if name in run.read)
    operations = run.leading_to(ends)
    used = {number for each in operations for number in each.reads}
    read = {name: run.numbers[id(tensor)] for name, tensor in given.items() if run.numbers[id(tensor)] in used}
    sizes = {name: prod(weight_shape(name, layer)) for name, layer in layers.items()}
    return TemporalBlock(
        component=component,
        layers=own,
        ends=ends,
        inputs=tuple(read),
        share=sum(sizes[name] for name in own) / max(1, sum(sizes.values())),
        operations=operations,
        given=read,
        shapes={name: tuple(given[name].shape) for name in read},
    )


def _held(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), last)
    return value


@dataclass(frozen=True)
class _Origin:
    """What a tensor comes from: inputs by name, layers on any way to it, and the last layers on those ways."""

    inputs: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()

    @classmethod
    def joined(cls, several: Sequence["_Origin"]) -> "_Origin":
        def union(field: str) -> frozenset[str]:
            return frozenset().union(*(getattr(each, field) for each in several))

        return cls(union("inputs"), union("layers"), union("last"))


class _Run(TorchFunctionMode):
    """Follows tensors while it is entered, and records whatever does not come from the latents.

    `temporal` are the layers that lead to a tensor which comes from the timestep and not from the latents, `read` the
    last ones before something of the picture is computed with it.
    """

    def __init__(self, inputs: Mapping[str, Tensor], held: Mapping[int, str], latents: str, timestep: str) -> None:
        super().__init__()
        self.latents, self.timestep, self.held = latents, timestep, held
        self.numbers: dict[int, int] = {}
        self.origins: dict[int, _Origin] = {}
        self.kept: list[Tensor] = []  # an id is a tensor's as long as it lives
        self.operations: list[_Operation] = []
        self.order: dict[str, None] = {}
        self.temporal: set[str] = set()
        self.read: set[str] = set()
        self._in_layer = 0
        for name, tensor in inputs.items():
            self._set(tensor, _Origin(frozenset([name])))

    def watch(self, name: str, layer: nn.Module, hooks: ExitStack) -> None:
        """A layer is one operation, whatever it computes."""

        def before(*_: object) -> None:
            self._in_layer += 1

        def after(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._in_layer -= 1
            self.order.setdefault(name)
            self._note(name, args, kwargs, output)

        hooks.callback(layer.register_forward_pre_hook(before).remove)
        hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._in_layer:
            self._note(function, args, kwargs or {}, result)
        return result

    def leading_to(self, ends: Sequence[str]) -> tuple[_Operation, ...]:
        """What has to be run for the outputs of these layers, in order."""
        needed: set[int] = set()
        chosen = []
        for each in reversed(self.operations):
            if each.function in ends or needed.intersection(each.results):
                chosen.append(each)
                needed.update(each.reads)
        return tuple(reversed(chosen))

    def _note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if not made:
            return
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        origins = [self.origins.get(id(each), _Origin()) for each in given]
        origin = _Origin.joined(origins) if origins else _Origin()
        if self.latents in origin.inputs:
            for of_one in origins:
                if self._is_temporal(of_one):
                    self.read |= of_one.last
            origin = _Origin(frozenset([self.latents]))
            for each in made:
                self._set(each, origin)
            return
        if isinstance(function, str):
            origin = _Origin(origin.inputs, origin.layers | {function}, frozenset([function]))
        if self._is_temporal(origin):
            self.temporal |= origin.layers
        known_args, known_kwargs = tree_map(self._reference, (tuple(args), dict(kwargs)))
        for each in made:
            self._set(each, origin)
        results = tuple(self.numbers[id(each)] for each in made)
        self.operations.append(_Operation(function, known_args, known_kwargs, results))

    def _is_temporal(self, origin: _Origin) -> bool:
        return self.timestep in origin.inputs and self.latents not in origin.inputs

    def _reference(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.numbers:
            return _Ref(self.numbers[id(leaf)])
        return _Held(self.held[id(leaf)]) if id(leaf) in self.held else leaf

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self.numbers[id(tensor)] = len(self.kept)
        self.origins[id(tensor)] = origin
        self.kept.append(tensor)
