# SPDX-License-Identifier: Apache-2.0
"""Gradients of a model's output in each layer's own output, for several vectors at once, one block in memory.

Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): only what goes into and comes out of a block is kept, and
the block runs again when its gradients are due, once for all vectors. Weights get no gradients.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..ground.heap import give_back_freed

Gradients = list[Tensor | None]
"""One for each of some tensors; None where there is none."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input `x` and, for each vector v, the gradient of <v, y> in the layer's output."""

    layer: str
    x: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class _BlockCall:
    """`inputs` are all that the block was called with; `outputs` are zeros that were added to what it gave."""

    block: nn.Module
    arguments: TreeSpec
    inputs: list[Any]
    versions: list[int]
    outputs: list[Tensor | None]


class BlockTape:
    """Records a model's calls of its blocks, and goes back through them.

    `blocks` are run again as wholes; one that lies in another is part of it. A layer outside of all is a block of its
    own, so what is kept between blocks holds no layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Collection[nn.Module]) -> None:
        inside = {module for block in blocks for module in block.modules()}
        outside = [layer for layer in layers.values() if layer not in inside]
        self.layers = layers
        self.blocks = list(dict.fromkeys([*blocks, *outside]))
        self.calls: list[_BlockCall] = []
        self.in_block = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While this is open, what the model's blocks are called with is recorded, with gradients between them."""
        with ExitStack() as undo, torch.enable_grad():
            for block in self.blocks:
                before = block.__dict__.get("forward")
                block.forward = self._recorded(block, block.forward)
                undo.callback(block.__dict__.__delitem__, "forward") if before is None else undo.callback(
                    setattr, block, "forward", before
                )
            yield

    def _recorded(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.in_block:
                return forward(*args, **kwargs)
            self.in_block = True
            try:
                with torch.no_grad():
                    result = forward(*args, **kwargs)
            finally:
                self.in_block = False
            inputs, arguments = tree_flatten((args, kwargs))
            outputs, shape = tree_flatten(result)
            zeros = [_zero_for(each) if _is_float(each) else None for each in outputs]
            self.calls.append(_BlockCall(block, arguments, inputs, _versions(inputs), zeros))
            # A sum may be written into where a leaf may not.
            handed_on = [each if zero is None else each + zero for each, zero in zip(outputs, zeros, strict=True)]
            return tree_unflatten(handed_on, shape)

        return call

    @property
    def kept_bytes(self) -> int:
        """Bytes of what the recorded calls gave."""
        outputs = [each for call in self.calls for each in call.outputs if each is not None]
        return sum(each.numel() * each.element_size() for each in outputs)

    def backward(self, y: Tensor, vectors: Sequence[Tensor]) -> Iterator[LayerCall]:
        """Each call of a layer from which anything reaches `y`, block by block from the last; uses the record up.

        `vectors` have the shape of `y`.
        """
        arrived: list[dict[int, Tensor]] = [{} for _ in vectors]
        self._pass_on([y], [[vector] for vector in vectors], arrived)
        while self.calls:
            call = self.calls.pop()
            gradients = [[found.pop(id(each), None) for each in call.outputs] for found in arrived]
            if any(each is not None for of_vector in gradients for each in of_vector):
                layer_calls, passed = self._through(call, gradients)
                self._pass_on(call.inputs, passed, arrived)
                yield from layer_calls
                give_back_freed()

    def _pass_on(
        self, tensors: Sequence[Any], gradients: Sequence[Gradients], arrived: list[dict[int, Tensor]]
    ) -> None:
        """Takes gradients in `tensors`, a list for each vector, through what lies between blocks to earlier outputs."""
        leaves = [each for call in self.calls for each in call.outputs if each is not None]
        for of_vector, found in zip(gradients, arrived, strict=True):
            given = [(tensor, each) for tensor, each in zip(tensors, of_vector, strict=True) if each is not None]
            if not given or not leaves:
                continue
            ends, each_gradient = zip(*given, strict=True)
            reached = torch.autograd.grad(ends, leaves, each_gradient, retain_graph=True, allow_unused=True)
            for leaf, gradient in zip(leaves, reached, strict=True):
                if gradient is not None:
                    found[id(leaf)] = found[id(leaf)] + gradient if id(leaf) in found else gradient

    def _through(self, call: _BlockCall, gradients: Sequence[Gradients]) -> tuple[list[LayerCall], list[Gradients]]:
        """Runs a block again; its layers' calls, and the gradients in its inputs for each vector."""
        if _versions(call.inputs) != call.versions:
            raise RuntimeError(f"an input of a {type(call.block).__name__} was written into after it was read")
        inputs = [_again(each) for each in call.inputs]
        args, kwargs = tree_unflatten(inputs, call.arguments)
        with torch.enable_grad(), self._seen() as seen:
            outputs, _ = tree_flatten(call.block(*args, **kwargs))
        asked = [index for index, each in enumerate(inputs) if isinstance(each, Tensor) and each.requires_grad]
        wanted = [*(inputs[index] for index in asked), *(zero for _, _, zero in seen)]
        if not wanted:  # no layer in it, and none before it
            return [], [[None] * len(inputs) for _ in gradients]
        passed: list[Gradients] = []
        by_layer: list[list[Tensor]] = [[] for _ in seen]
        for of_vector in gradients:
            given = [(out, each) for out, each in zip(outputs, of_vector, strict=True) if each is not None]
            ends, each_gradient = zip(*given, strict=True)
            found = torch.autograd.grad(ends, wanted, each_gradient, retain_graph=True, materialize_grads=True)
            in_inputs: Gradients = [None] * len(inputs)
            for index, gradient in zip(asked, found, strict=False):
                in_inputs[index] = gradient
            passed.append(in_inputs)
            for layer_gradients, gradient in zip(by_layer, found[len(asked) :], strict=True):
                layer_gradients.append(gradient)
        calls = [LayerCall(name, x, tuple(each)) for (name, x, _), each in zip(seen, by_layer, strict=True)]
        return calls, passed

    @contextmanager
    def _seen(self) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
        """Name, input and an added zero of each call of a layer: the zero's gradient is that of the layer's output."""
        seen: list[tuple[str, Tensor, Tensor]] = []

        def see(name: str) -> Callable[..., Tensor]:
            def hook(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
                zero = _zero_for(output)
                seen.append((name, inputs[0].detach(), zero))
                return output + zero

            return hook

        self.in_block = True
        hooks = [layer.register_forward_hook(see(name)) for name, layer in self.layers.items()]
        try:
            yield seen
        finally:
            self.in_block = False
            for hook in hooks:
                hook.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _zero_for(output: Tensor) -> Tensor:
    """A leaf of one number and this shape: added to the output, it has the output's gradient."""
    return torch.zeros((), dtype=output.dtype, device=output.device).expand_as(output).detach().requires_grad_()


def _versions(values: list[Any]) -> list[int]:
    """How often each tensor was written into."""
    return [each._version if isinstance(each, Tensor) else 0 for each in values]


def _again(value: Any) -> Any:
    """The same input, from which no gradient goes further back."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
