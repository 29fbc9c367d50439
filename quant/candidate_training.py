# SPDX-License-Identifier: Apache-2.0
"""Codes, codebooks and biases trained block by block, until each block gives what the float model's gave.

VQ4DiT (arXiv 2408.17131), section 3.3: no data, only noise and prompts; the float model draws, and both models see what
it drew. A block's input is what the stored blocks before it make of that, its target the float block's output in the
same call, so its loss counts errors that came before. One block is trained at a time: the paper trains all at once,
with ratios and candidates of the whole model in memory.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from ..ground.errors import TurbopocketError
from ..ground.heap import give_back_freed
from ..ground.names import LayerName
from .block_inputs import BlockInputs
from .candidates import SoftWeight, has_candidates
from .compress import decompressed
from .finetune import HELD_OUT, Trained, held_vector
from .formats import CompressedTensor
from .layers import weight_of
from .options import CandidateOptions
from .sequential import OUTPUTS_FOLDER, Calls, Walk
from .store import load_weights, save_tensors, save_weights

INPUTS_FOLDER = "inputs"
DECIDED = 0.05
"""Ratios are hardened when they are so near to 0 and 1 (L_r), in the schedule `joint`."""
FROZEN_SHARE = 0.99
"""Or when so many vectors of each layer are frozen, in the schedule `freeze`."""
ALPHA = 0.9
"""RMSprop's, as released."""
SMALLEST_BIAS = 1e-2
"""A bias of zeros is moved in this unit."""


@dataclass(frozen=True)
class BlockLosses:
    """Σ (y - ŷ)² / Σ y² of a block's held-out calls: as it was stored, right before and right after ratios were
    hardened, and at the end. When that is not lower than before, the block is as it was stored."""

    before: float
    soft: float
    hard: float
    after: float


class BlockCalls(Sequence[tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]]):
    """What a block is given, by position and by name, and what the float block gave in the same call."""

    def __init__(self, name: str, inputs: BlockInputs, targets: Path) -> None:
        self.name, self.inputs, self.targets = name, inputs, targets

    def __len__(self) -> int:
        return len(self.inputs.calls.get(self.name, ()))

    def __getitem__(self, index: Any) -> Any:
        args, kwargs, _ = self.inputs.call(self.name, index)
        found = load_file(_target_file(self.targets, self.name, index))
        return args, kwargs, tuple(found[str(place)] for place in range(len(found)))


def train_in_blocks(
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, CompressedTensor],
    order: Sequence[str],
    calls_of: Callable[[str], Calls],
    options: CandidateOptions,
    folder: Path,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, CompressedTensor], dict[str, BlockLosses]]:
    """All weights, in which codes, codebooks and scales of blocks that have any are trained, and these blocks' biases,
    by their own names; with the losses of each such block.

    `order` has the layers as they run. `calls_of` draws with the float model and gives a component's calls. Each
    finished block is a file in `folder`: a later call with the same arguments goes on behind it, to the same bytes. The
    modules hold their own weights afterwards. `advance` is called after each block of `trained_blocks`.
    Raises TurbopocketError as `train_block` does, and for a block that is called with other things than tensors and
    plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, losses = dict(weights), dict[str, BlockLosses]()
    wanted = trained_blocks(blocks, weights, order)
    for component, module in modules.items():
        own = [name for name in wanted if LayerName.parse(name).component == component]
        if not own:
            continue
        if not all(_losses_file(folder, name).is_file() for name in own):
            _train_component(component, module, blocks, layers, weights, order, own, calls_of, options, folder, seed)
        for name in own:
            stored |= load_weights(_weights_file(folder, name))
            losses[name] = BlockLosses(*load_file(_losses_file(folder, name))["losses"].tolist())
            advance()
    return stored, losses


def trained_blocks(
    blocks: Mapping[str, nn.Module], weights: Mapping[str, CompressedTensor], order: Sequence[str]
) -> list[str]:
    """Blocks that have a layer stored as vectors of a codebook, in the order in which they run."""
    members = (_block_of(layer, blocks) for layer in order if layer in weights and has_candidates(weights[layer]))
    return list(dict.fromkeys(members))


def _block_of(layer: str, blocks: Mapping[str, nn.Module]) -> str:
    return next(name for name in blocks if layer == name or layer.startswith(f"{name}."))


def _train_component(
    component: str,
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, CompressedTensor],
    order: Sequence[str],
    wanted: Sequence[str],
    calls_of: Callable[[str], Calls],
    options: CandidateOptions,
    folder: Path,
    seed: int,
) -> None:
    """Writes a file for each wanted block of a component that has none yet."""
    members: dict[str, dict[str, CompressedTensor]] = {}
    for layer in order:
        if LayerName.parse(layer).component == component and layer in weights:
            members.setdefault(_block_of(layer, blocks), {})[layer] = weights[layer]
    walk = Walk({name: blocks[name] for name in members}, partial(calls_of, component), folder / OUTPUTS_FOLDER)
    targets, inputs = folder / OUTPUTS_FOLDER, folder / INPUTS_FOLDER
    _record_outputs({name: blocks[name] for name in wanted}, walk.calls, targets)
    with ExitStack() as prefix:
        for name, own in members.items():
            if name in wanted and not _losses_file(folder, name).is_file():
                given = BlockInputs(inputs)
                with given.recording({name: blocks[name]}, {}):
                    walk.up_to(name)
                if name not in given.calls:
                    raise TurbopocketError(
                        f"{name}: its candidates can not be trained, since it is called with something that is neither "
                        "a tensor nor a plain value"
                    )
                floats = {layer: weight_of(layer, layers[layer]).detach() for layer in own}
                calls = BlockCalls(name, given, targets)
                trained, losses = train_block(name, blocks[name], floats, own, calls, options, seed)
                save_weights(_weights_file(folder, name), trained)
                save_tensors(_losses_file(folder, name), {"losses": torch.tensor(astuple(losses), dtype=torch.float64)})
                shutil.rmtree(inputs)
                give_back_freed()
            own = load_weights(_weights_file(folder, name)) if name in wanted else own
            prefix.enter_context(decompressed({component: module}, own))
    shutil.rmtree(folder / OUTPUTS_FOLDER, ignore_errors=True)


def _weights_file(folder: Path, block: str) -> Path:
    return folder / f"000-{block}.safetensors"


def _losses_file(folder: Path, block: str) -> Path:
    """Written last: a block that has one is done."""
    return folder / f"001-{block}.safetensors"


def _target_file(folder: Path, block: str, index: int) -> Path:
    return folder / f"{index}-{block}-target.safetensors"


def _record_outputs(blocks: Mapping[str, nn.Module], calls: Calls, folder: Path) -> None:
    """Writes what each block gives in each call of the float model."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():
            times = iter(range(10**9))

            def keep(_: object, __: object, output: Any, name: str = name, times: Iterator[int] = times) -> None:
                tensors = {str(place): each for place, each in enumerate(_tensors(output))}
                save_tensors(_target_file(folder, name, next(times)), tensors)

            hooks.callback(block.register_forward_hook(keep).remove)
        for call in calls:
            call()


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(each for each in tree_flatten(output)[0] if isinstance(each, Tensor))


def train_block(
    name: str,
    block: nn.Module,
    floats: Mapping[str, Tensor],
    weights: Mapping[str, CompressedTensor],
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]],
    options: CandidateOptions,
    seed: int = 0,
) -> tuple[dict[str, CompressedTensor], BlockLosses]:
    """The block's weights and biases after training, by full name, with their losses.

    `floats` are its float weights, `weights` the stored ones. Raises TurbopocketError for fewer calls than two, and
    when a loss is no longer finite.
    """
    if len(calls) < 2:
        raise TurbopocketError(
            f"{name}: training candidates needs 2 recorded calls or more, one of them held out, not {len(calls)}",
            hint="more pictures give more calls",
        )
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, shown = order[: max(1, len(calls) // HELD_OUT)], order[max(1, len(calls) // HELD_OUT) :]
    student = _Student(name, block, floats, weights, options)

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(student.loss(calls[index])) for index in held_out) / len(held_out)

    before = mean_loss_of(student.as_stored(), calls, held_out)
    training = _Training(student, options, before)
    soft = hard = before
    for iteration in range(options.iterations):
        training.step(calls[shown[iteration % len(shown)]], iteration)
        if not student.is_hard and training.is_decided(iteration):
            soft = mean_loss()
            student.harden()
            hard = mean_loss()
    trained = student.compressed()
    after = mean_loss_of(student.as_stored(trained), calls, held_out)
    kept = trained if after < before else dict(weights)
    return kept, BlockLosses(before, soft, hard, after)


def mean_loss_of(
    run: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, ...]],
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]],
    indices: Sequence[int],
) -> float:
    """The loss of a block over some calls."""
    with torch.no_grad():
        return sum(float(_relative(run(*calls[i][:2]), calls[i][2])) for i in indices) / len(indices)


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Σ (y - ŷ)² / Σ y², averaged over the outputs: each call, and so each timestep, counts alike."""
    terms = [(a - b).square().mean() / b.square().mean().clamp(min=1e-30) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(terms).mean()


class _Student:
    """A block with stored weights, as a function of what is trained in them."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        floats: Mapping[str, Tensor],
        weights: Mapping[str, CompressedTensor],
        options: CandidateOptions,
    ) -> None:
        self.name, self.block, self.weights = name, block, weights
        self.soft = {
            layer: SoftWeight(floats[layer], stored, options.count, options.start)
            for layer, stored in weights.items()
            if has_candidates(stored)
        }
        self.fixed = {
            layer: stored.format.decompress(stored) for layer, stored in weights.items() if layer not in self.soft
        }
        own = dict(block.named_parameters())
        biases = {layer: own.get(self._parameter(layer, "bias")) for layer in self.soft}
        self.biases = {layer: _trained_bias(bias) for layer, bias in biases.items() if bias is not None}

    def _parameter(self, layer: str, kind: str) -> str:
        path = layer.removeprefix(self.name).removeprefix(".")
        return f"{path}.{kind}" if path else kind

    @property
    def is_hard(self) -> bool:
        return all(each.is_hard for each in self.soft.values())

    def harden(self) -> None:
        for each in self.soft.values():
            each.harden()

    def loss(self, call: tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]) -> Tensor:
        args, kwargs, wanted = call
        values = {layer: each() for layer, each in self.soft.items()} | self.fixed
        biases = {layer: each() for layer, each in self.biases.items()}
        return _relative(self._run(values, biases, args, kwargs), wanted)

    def _run(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        values = {self._parameter(layer, "weight"): each for layer, each in weights.items()}
        values |= {self._parameter(layer, "bias"): each for layer, each in biases.items()}
        return _tensors(functional_call(self.block, values, args, kwargs))

    def as_stored(
        self, stored: Mapping[str, CompressedTensor] | None = None
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, ...]]:
        """The block with what is stored, by default what training began with."""
        stored = self.weights if stored is None else stored
        weights = {layer: stored[layer].format.decompress(stored[layer]) for layer in self.weights}
        biases = {
            layer: stored[bias].format.decompress(stored[bias])
            for layer in self.biases
            if (bias := f"{layer}.bias") in stored
        }
        return partial(self._run, weights, biases)

    @torch.no_grad()
    def compressed(self) -> dict[str, CompressedTensor]:
        self.harden()
        stored = {
            layer: self.soft[layer].compressed() if layer in self.soft else each for layer, each in self.weights.items()
        }
        return stored | {f"{layer}.bias": held_vector(each().clone()) for layer, each in self.biases.items()}


def _trained_bias(bias: Tensor) -> Trained:
    trained = Trained(bias)
    if not bool((bias != 0).any()):
        trained.unit = torch.tensor(SMALLEST_BIAS)
    return trained


class _Training:
    """RMSprop on ratios, and on codebooks, scales and biases, in the order that the schedule has."""

    def __init__(self, student: _Student, options: CandidateOptions, before: float) -> None:
        self.student, self.options, self.before = student, options, max(before, 1e-30)
        self.last = float("inf")
        logits = [each for soft in student.soft.values() for each in soft.logits]
        biases = [each.parameter for each in student.biases.values()]
        values = [each for soft in student.soft.values() for each in soft.values]
        self.ratios = torch.optim.RMSprop(logits, lr=options.ratio_learning_rate, alpha=ALPHA) if logits else None
        self.biases = torch.optim.RMSprop(biases, lr=options.learning_rate, alpha=ALPHA) if biases else None
        self.values = torch.optim.RMSprop(values, lr=options.learning_rate, alpha=ALPHA)

    def step(self, call: tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]], iteration: int) -> None:
        hard = self.student.is_hard
        error = self.student.loss(call) / self.before
        found = float(error.detach())
        if not found < float("inf"):
            raise TurbopocketError(
                f"{self.student.name}: the loss is {found} in iteration {iteration + 1} of training candidates",
                hint=f"a lower learning rate than {self.options.learning_rate:g} may help",
            )
        loss = error
        if not hard and (self.options.schedule == "joint" or found >= self.last):
            undecided = [each for each in self.student.soft.values() if not each.is_hard]
            penalty = torch.stack([each.indecision(self.options.schedule) for each in undecided]).mean()
            loss = error + self.options.ratio_weight * penalty
        self.last = found
        moved = [
            *([self.ratios] if self.ratios is not None and not hard else []),
            *([self.biases] if self.biases is not None else []),
            *([self.values] if hard or self.options.schedule == "joint" else []),
        ]
        for optimizer in moved:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in moved:
            if optimizer is not self.ratios:
                optimizer.param_groups[0]["lr"] = self.options.learning_rate * (1 - iteration / self.options.iterations)
            optimizer.step()

    def is_decided(self, iteration: int) -> bool:
        """Whether it is time to harden all ratios."""
        if 2 * (iteration + 1) >= self.options.iterations:
            return True
        soft = [each for each in self.student.soft.values() if not each.is_hard]
        if self.options.schedule == "freeze":
            return min(each.freeze() for each in soft) > FROZEN_SHARE
        with torch.no_grad():
            return float(torch.stack([each.indecision("joint") for each in soft]).mean()) < DECIDED
