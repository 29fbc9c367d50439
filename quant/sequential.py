# SPDX-License-Identifier: Apache-2.0
"""A plan carried out block by block: each block is fitted to inputs that the stored blocks before it cause.

Egiazarian et al., VQDM (2024), section 3.3: the Hessians of the next block are collected with the quantized prefix in
place, so that a fit counts what the model will see and not what it saw before it was compressed.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..ground.heap import give_back_freed
from ..ground.names import LayerName
from .calibrate import calibrate
from .compress import compress, decompressed
from .fit import Fit
from .formats import CompressedTensor
from .observe import LayerStats, needed_by
from .plan import Choice, Plan
from .store import load_weights, save_tensors, save_weights
from .workers import Spread, in_turn

OUTPUTS_FOLDER = "outputs"

Calls = Sequence[Callable[[], object]]
"""What runs a component, once each, as it was run while calibration pictures were drawn."""


def compress_in_blocks(
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    plan: Plan,
    fit: Fit,
    stats: Mapping[str, LayerStats],
    calls_of: Callable[[str], Calls],
    checkpoints: Path,
    spread: Spread = in_turn,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, CompressedTensor]:
    """Like `compress`, in the plan's order, but with statistics collected anew for each block.

    Components come in the order of `modules`, in which drawing runs them, and their blocks in the order in which
    `stats` has the first layer of each. `calls_of` draws once, with the components before that one stored, and gives
    that one's calls; each block is then run once as it is, for its statistics, and once as it is stored, for those that
    follow. What it gives is kept in files until its component is done.

    Each finished block is a file in `checkpoints`; a later call with the same arguments reads those that are there, and
    gives the same bytes as a call that was never cut short. The modules hold their own weights afterwards. `advance` is
    called after each layer. Raises TurbopocketError as `compress` does, and for a damaged checkpoint.
    """
    choices = {choice.layer: choice for choice in plan.choices}
    in_order = [name for name in stats if name in choices] + [name for name in choices if name not in stats]
    checkpoints.mkdir(parents=True, exist_ok=True)
    stored, index = dict[str, CompressedTensor](), count()
    with ExitStack() as prefix:
        for component, module in modules.items():
            members: dict[str, list[Choice]] = {}
            for name in in_order:
                if LayerName.parse(name).component == component:
                    members.setdefault(_block_of(name, blocks), []).append(choices[name])
            files = {block: checkpoints / f"{next(index):03}-{block}.safetensors" for block in members}
            walk = None
            if not all(file.is_file() for file in files.values()):
                # Before any block of it is stored, so that one that goes on later draws the same.
                own_blocks = {name: blocks[name] for name in members}
                walk = Walk(own_blocks, partial(calls_of, component), checkpoints / OUTPUTS_FOLDER)
            for block, own in members.items():
                if walk is not None and not files[block].is_file():
                    wanted = {choice.layer: layers[choice.layer] for choice in own}
                    # Nothing of the model has changed before the first block.
                    seen = _seen(component, module, walk, block, wanted, fit) if stored else stats
                    weights = compress(wanted, replace(plan, choices=tuple(own)), fit, seen, spread)
                    save_weights(files[block], weights)
                weights = load_weights(files[block])
                prefix.enter_context(decompressed(modules, weights))
                stored |= weights
                for _ in own:
                    advance()
            shutil.rmtree(checkpoints / OUTPUTS_FOLDER, ignore_errors=True)
    return {name: stored[name] for name in choices}


def _block_of(layer: str, blocks: Mapping[str, nn.Module]) -> str:
    return next(name for name in blocks if layer == name or layer.startswith(f"{name}."))


def _seen(
    component: str, module: nn.Module, walk: "Walk", block: str, wanted: Mapping[str, nn.Module], fit: Fit
) -> Mapping[str, LayerStats]:
    seen = calibrate({component: module}, lambda: walk.up_to(block), set(wanted), (needed_by(fit),))
    give_back_freed()
    return seen


class _Reached(Exception):
    """The block whose inputs are wanted has had its last call."""


class Walk:
    """A component's calls, each up to one of its blocks; what blocks before that gave is read from files."""

    def __init__(self, blocks: Mapping[str, nn.Module], draw: Callable[[], Calls], folder: Path) -> None:
        """`draw` gives the calls. `blocks` are in the order in which they run."""
        self.blocks, self.folder = blocks, folder
        self.structures: dict[Path, TreeSpec] = {}
        self.times: Counter[str] = Counter()
        with ExitStack() as hooks:
            for name, block in blocks.items():
                hooks.callback(block.register_forward_hook(lambda *_, name=name: self.times.update([name])).remove)
            self.calls = draw()

    def up_to(self, target: str) -> None:
        """Runs every call until the target has run, with the blocks before it as they are stored by now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = takewhile(lambda name: name != target, self.blocks)
        passed = {name: self.blocks[name] for name in before}
        for index, call in enumerate(self.calls):
            left = count(self.times[target] // len(self.calls), -1)

            def reached(*_: object, left: Iterator[int] = left) -> None:
                if next(left) <= 1:
                    raise _Reached

            with ExitStack() as undo, torch.no_grad(), suppress(_Reached):
                for name, block in passed.items():
                    undo.enter_context(_replaced(block, self._kept(block.forward, f"{index}-{name}")))
                # A hook, and the last one: the layer's own statistics are taken by one.
                undo.callback(self.blocks[target].register_forward_hook(reached).remove)
                call()

    def _kept(self, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The forward of a stored block, which runs once for each call of it. What gives more than tensors, or writes
        into what it is given, runs each time."""
        times = count()

        def run(*args: Any, **kwargs: Any) -> Any:
            file = self.folder / f"{name}-{next(times)}.safetensors"
            if file not in self.structures:
                inputs = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
                versions = [each._version for each in inputs]
                result = forward(*args, **kwargs)
                outputs, structure = tree_flatten(result)
                unchanged = versions == [each._version for each in inputs]
                if not unchanged or not all(isinstance(each, Tensor) for each in outputs):
                    return result
                save_tensors(file, {str(place): each for place, each in enumerate(outputs)})
                self.structures[file] = structure
            # Read the first time as well, so that what follows never depends on how the tensors lay in memory.
            found = load_file(file)
            return tree_unflatten([found[str(place)].clone() for place in range(len(found))], self.structures[file])

        return run


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, the module computes this."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
