# SPDX-License-Identifier: Apache-2.0
"""A denoiser reconstructed block by block in the memory of one block, and its temporal information block by itself.

Huang et al., TFMQ-DM (2024, arXiv 2311.16503), section 4.2: layers that depend on the timestep alone are left out of
their blocks' reconstruction, whose targets depend on pictures, and are learned for Σ_i E_t ||g_i(h(t)) - ĝ_i(ĥ(t))||².
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ground.files import write_whole
from ..ground.heap import give_back_freed
from ..ground.names import at_place
from .block_inputs import BlockInputs
from .formats import CompressedTensor, parse_format
from .layer_rounding import Rounding
from .layers import compressible_layers, materialise
from .options import ReconstructOptions
from .reconstruct import KEPT_BYTES, Unit, is_learned, reconstruct
from .store import OverlaidStore, WeightStore, save_weights
from .temporal import TemporalBlock
from .temporal_errors import TemporalCall

UNITS_FOLDER = "units"
TEMPORAL = "temporal"
"""The unit that TIAR reconstructs; no block's name has no component."""


@dataclass(frozen=True)
class TemporalUnit:
    """What temporal features are computed from: of the denoiser `module`, whose `layers` they are by name, in these
    calls."""

    block: TemporalBlock
    module: nn.Module
    layers: Mapping[str, nn.Module]
    calls: Sequence[TemporalCall]


def reconstruct_to_files(
    blocks: Mapping[str, nn.Module],
    temporal: TemporalUnit,
    inputs: BlockInputs,
    stored: Mapping[str, CompressedTensor],
    roundings: Mapping[str, Rounding],
    options: ReconstructOptions,
    seed: int,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Learns the rounding of every integer layer of a denoiser's `blocks`, each on its own calls in `inputs`.

    Modules hold float weights, and go on to. `stored` are all their layers as they are stored without that. Each layer
    is a file in `folder`, and each unit one with its errors; a later call with the same arguments makes what is
    missing, and ends with the same files. `advance` is called after each block. Raises what `reconstruct` raises.
    """
    (folder / UNITS_FOLDER).mkdir(parents=True, exist_ok=True)
    block = temporal.block
    apart = () if options.temporal == "inside" else block.layers
    if options.temporal == "tiar" and block.ends:
        own = [name for name in block.layers if is_learned(stored[name].format)]
        if own and not _errors_file(folder, TEMPORAL).is_file():
            _make(FeatureUnit(temporal, _device()), TEMPORAL, own, stored, roundings, options, seed, folder)
    known = OverlaidStore(stored, reconstructed_in(folder))
    for prefix, module in blocks.items():
        for name in [each for each in inputs.calls if each == prefix or each.startswith(f"{prefix}.")]:
            inner = module.get_submodule(name[len(prefix) + 1 :])
            own = [each for each in compressible_layers(name, inner) if each in stored and each not in apart]
            own = [each for each in own if is_learned(stored[each].format)]
            if own and not _errors_file(folder, name).is_file():
                unit = BlockUnit(name, inner, inputs, _device())
                _make(unit, name, own, known, roundings, options, seed, folder)
            give_back_freed()
        advance()


def reconstructed_in(folder: Path) -> WeightStore:
    """The layers that are there with learned rounding."""
    told = {name: form for file in _errors_files(folder) for name, form in _load(file)["layers"].items()}
    return WeightStore(folder, {name: parse_format(form) for name, form in told.items()})


def errors_in(folder: Path) -> dict[str, tuple[float, float]]:
    """Errors of each unit before and after, by its name: shares of the power of its float outputs."""
    return {file.stem: (_load(file)["before"], _load(file)["after"]) for file in _errors_files(folder)}


def _make(
    unit: Unit,
    name: str,
    own: Sequence[str],
    stored: Mapping[str, CompressedTensor],
    roundings: Mapping[str, Rounding],
    options: ReconstructOptions,
    seed: int,
    folder: Path,
) -> None:
    learned = {each: stored[each] for each in own}
    fixed = {each: stored[each] for each in unit.layers if each in stored and each not in learned}
    found = reconstruct(unit, learned, fixed, roundings, options, seed)
    formats = {each: weight.format for each, weight in learned.items()}
    store = WeightStore(folder, formats)
    for each, weight in found.weights.items():
        save_weights(store.file(each), {each: weight})
    with write_whole(_errors_file(folder, name)) as file:  # the last, so that a unit that has it is whole
        told = {each: str(form) for each, form in formats.items()}
        file.write_text(json.dumps({"layers": told, "before": found.before, "after": found.after}))


def _errors_file(folder: Path, unit: str) -> Path:
    return folder / UNITS_FOLDER / f"{unit}.json"


def _errors_files(folder: Path) -> list[Path]:
    return sorted((folder / UNITS_FOLDER).glob("*.json"))


def _load(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _twin(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy that holds its weights in float32 itself, on the device."""
    twin = copy.deepcopy(module)
    materialise(twin)
    return twin.to(device).requires_grad_(False)


class FeatureUnit(Unit):
    """Temporal features as a function of the layers that they depend on; latents are not among what is read."""

    def __init__(self, temporal: TemporalUnit, device: torch.device) -> None:
        block = temporal.block
        self.block, self.module = block, temporal.module
        self.layers = {name: _twin(temporal.layers[name], device) for name in block.layers}
        self.calls = [
            (asdict(call.place), {name: call.inputs[name].to(device) for name in block.inputs})
            for call in temporal.calls
        ]
        self.groups = [range(len(self.calls))]

    def run(self, calls: Sequence[int]) -> tuple[Tensor, ...]:
        """Features [B, D] of each g_i."""
        rows = []
        for place, inputs in (self.calls[call] for call in calls):
            with at_place(**place):
                rows.append(tuple(self.block.features(self.module, self.layers, inputs).values()))
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))


class BlockUnit(Unit):
    """A block on the calls that it had in the model; those of one step, of equal shapes, are made as one batch."""

    def __init__(self, name: str, block: nn.Module, inputs: BlockInputs, device: torch.device) -> None:
        self.name, self.inputs, self.device = name, inputs, device
        self.twin = _twin(block, device)
        self.layers = compressible_layers(name, self.twin)
        self.left = KEPT_BYTES
        self.kept: dict[int, _Call] = {}
        groups: dict[Any, list[int]] = {}
        for index in range(len(inputs.calls[name])):
            call = self._call(index)
            groups.setdefault(call.kind, []).append(index)
        self.groups = list(groups.values())
        self.one_by_one = not all(self._joins(group[:2]) for group in self.groups)

    def run(self, calls: Sequence[int]) -> tuple[Tensor, ...]:
        """All tensors that the block gives."""
        read = [self._call(call) for call in calls]
        if self.one_by_one or len(calls) == 1:
            rows = [self._outputs(each.leaves, each) for each in read]
            return tuple(torch.cat(column) for column in zip(*rows, strict=True))
        columns = zip(*(each.leaves for each in read), strict=True)
        return self._outputs([_joined(column) for column in columns], read[0])

    def _joins(self, calls: Sequence[int]) -> bool:
        """Whether a batch of these calls gives what they give."""
        if len(calls) < 2:
            return True
        with torch.no_grad():
            self.one_by_one = True
            apart = self.run(calls)
            self.one_by_one = False
            together = self.run(calls)
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
            for one, other in zip(apart, together, strict=True)
        )

    def _outputs(self, leaves: Sequence[Any], like: "_Call") -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten([_own(leaf) for leaf in leaves], like.structure)
        with at_place(**like.place):
            result = self.twin(*args, **kwargs)
        return tuple(leaf for leaf in pytree.tree_flatten(result)[0] if isinstance(leaf, Tensor))

    def _call(self, index: int) -> "_Call":
        if index in self.kept:
            return self.kept[index]
        args, kwargs, place = self.inputs.call(self.name, index)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        moved = [leaf.to(self.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = _Call(moved, structure, asdict(place))
        nbytes = sum(leaf.nbytes for leaf in moved if isinstance(leaf, Tensor))
        if nbytes <= self.left:
            self.left -= nbytes
            self.kept[index] = call
        return call


@dataclass(frozen=True)
class _Call:
    leaves: Sequence[Any]
    structure: Any
    place: dict[str, Any]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for calls that can be made at once: at one step, so that what depends on it holds for all."""
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return self.place["step"], str(self.structure), *shapes


def _joined(column: Sequence[Any]) -> Any:
    """The first dimension of a tensor is the batch's; whatever has none is the same in all calls of a step."""
    first = column[0]
    return torch.cat(list(column)) if isinstance(first, Tensor) and first.ndim else first


def _own(leaf: Any) -> Any:
    """A copy, since the block may write into it."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
