# SPDX-License-Identifier: Apache-2.0
"""What the blocks of a model were called with, kept in files, so that a block can be run again without the model."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ground.files import write_whole
from ..ground.names import CallPlace, at_place, current_place
from .observe.vectors import digest_of
from .store import save_tensors

CALLS_FILE = "calls.json"
_KEPT = (Tensor, bool, int, float, str, type(None))


class BlockInputs:
    """The arguments of every call of every block, in a folder: equal tensors once, and the calls in one file.

    A block that is given something that is neither a tensor nor a plain value is kept as its layers, each with calls of
    its own.
    """

    def __init__(self, folder: Path) -> None:
        """What `recording` wrote there, nothing before that."""
        self.folder = folder
        self.calls: dict[str, list[dict[str, Any]]] = {}
        if (folder / CALLS_FILE).is_file():
            self.calls = json.loads((folder / CALLS_FILE).read_text(encoding="utf-8"))

    @contextmanager
    def recording(self, blocks: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While the block runs, calls are written. They can be replayed when it has ended well.

        `blocks` are by name, and so are all `layers` in them, whose names begin with those of their blocks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.calls = {}
        opaque: set[str] = set()
        with ExitStack() as hooks:

            def watch(name: str, module: nn.Module, inside: str | None = None) -> None:
                def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    if (inside is None or inside in opaque) and not self._write(name, args, kwargs):
                        opaque.add(name)

                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)

            for name, block in blocks.items():
                watch(name, block)
                for layer in layers:
                    if layer.startswith(f"{name}."):
                        watch(layer, layers[layer], name)
            yield
        for name in opaque:
            self.calls.pop(name, None)
        with write_whole(self.folder / CALLS_FILE) as partial:
            partial.write_text(json.dumps(self.calls), encoding="utf-8")

    def replay(self, name: str, block: nn.Module, after: Callable[[], None] = lambda: None) -> None:
        """Calls the block as it was called, in the same order, at the same places."""
        for index in range(len(self.calls[name])):
            args, kwargs, place = self.call(name, index)
            with torch.inference_mode(), at_place(**asdict(place)):
                block(*args, **kwargs)
            after()

    def call(self, name: str, index: int) -> tuple[tuple[Any, ...], dict[str, Any], CallPlace]:
        """What one call was given, tensors of its own, and its place."""
        call = self.calls[name][index]
        leaves = [self._read(leaf) for leaf in call["leaves"]]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(call["structure"]))
        return args, kwargs, CallPlace(**call["place"])

    def _write(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Keeps one call; False, and nothing kept, when it can not be."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if not all(isinstance(leaf, _KEPT) for leaf in leaves):
            return False
        try:
            described = pytree.treespec_dumps(structure)
        except (NotImplementedError, TypeError):
            return False
        call = {
            "structure": described,
            "leaves": [self._written(leaf) if isinstance(leaf, Tensor) else {"value": leaf} for leaf in leaves],
            "place": asdict(current_place()),
        }
        self.calls.setdefault(name, []).append(call)
        return True

    def _written(self, x: Tensor) -> dict[str, Any]:
        digest = digest_of(x).hex()
        file = self._file(digest)
        if not file.is_file():
            save_tensors(file, {"x": x.detach()})
        return {"tensor": digest, "stride": x.stride()}

    def _read(self, leaf: dict[str, Any]) -> Any:
        if "tensor" not in leaf:
            return leaf["value"]
        # A copy, since the block may write into it; laid out as it was, since sums may depend on that.
        x = load_file(self._file(leaf["tensor"]))["x"]
        return torch.empty_strided(x.shape, _dense(x, leaf["stride"]), dtype=x.dtype).copy_(x)

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def _dense(x: Tensor, stride: list[int]) -> tuple[int, ...]:
    """The stride, where its elements fill their memory; else that of a tensor of the shape that does."""
    span = 1 + sum((size - 1) * step for size, step in zip(x.shape, stride, strict=True))
    return tuple(stride) if span == x.numel() else x.stride()
