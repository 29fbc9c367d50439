# SPDX-License-Identifier: Apache-2.0
"""Calibration in the memory of one block: the model runs once, then each block for itself, on the inputs it had."""

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from ..ground.errors import TurbopocketError
from ..ground.heap import give_back_freed
from ..ground.names import LayerName
from .block_inputs import BlockInputs
from .calibrate import calibrate
from .layers import compressible_layers
from .observe import OBSERVATIONS, InputPower, LayerStats, SecondMoment
from .store import OBSERVED_FILE, Kind, StatsStore, save_observed

INPUTS_FOLDER = "inputs"
REPLAY_ERROR = 1e-3
"""Of a column's power in a block run by itself: rounding, by which a library may add in another order, gives 1e-6."""


def calibrate_to_files(
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    run: Callable[[], object],
    needed: Collection[Kind],
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> StatsStore:
    """The statistics of every layer, in files: what is small of all of them, and the `needed` large ones.

    `run()` draws once. When something large is needed it leaves the inputs of all `blocks` in `folder`, and each block
    is then run by itself; so no more is in memory than a block's. Layers that were fed the same have one file. A later
    call in the same folder goes on at the block where one was killed, and ends with the same files. `advance` is called
    after each block.
    Raises TurbopocketError as `calibrate` does, and when a block run by itself is fed something else than in the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = BlockInputs(folder / INPUTS_FOLDER)
    large = [kind for kind in OBSERVATIONS.values() if kind.large and kind in needed]
    if not (folder / OBSERVED_FILE).is_file():
        layers = {
            name: each for prefix, own in modules.items() for name, each in compressible_layers(prefix, own).items()
        }
        with inputs.recording(blocks, layers) if large else nullcontext():
            small = [kind for kind in OBSERVATIONS.values() if not kind.large]
            stats = calibrate(modules, run, kinds=small)
        save_observed(folder, stats)
    store = StatsStore(folder)
    for block in blocks:
        for unit in [name for name in inputs.calls if name == block or name.startswith(f"{block}.")]:
            for kind in large:
                _observe(modules, unit, inputs, kind, store)
        give_back_freed()
        advance()
    shutil.rmtree(folder / INPUTS_FOLDER, ignore_errors=True)
    return store


def _observe(modules: Mapping[str, nn.Module], unit: str, inputs: BlockInputs, kind: Kind, store: StatsStore) -> None:
    """Writes the values of a large observation of all layers of a block that have none yet."""
    missing: dict[Path, str] = {}
    for layer in store:
        if (layer == unit or layer.startswith(f"{unit}.")) and not store.large_file(layer, kind).is_file():
            missing.setdefault(store.large_file(layer, kind), layer)
    if not missing:
        return
    component, path = LayerName.parse(unit)
    block = modules[component].get_submodule(path)
    seen = calibrate({component: modules[component]}, lambda: inputs.replay(unit, block), missing.values(), (kind,))
    for layer in missing.values():
        if kind is SecondMoment:
            _require_same_inputs(layer, seen, store)
        store.save_large(layer, kind, seen[layer][kind])


def _require_same_inputs(layer: str, seen: Mapping[str, LayerStats], store: StatsStore) -> None:
    power_K = store[layer][InputPower]
    found_K = seen[layer][SecondMoment].diagonal()
    if float((found_K - power_K).abs().max()) > REPLAY_ERROR * float(power_K.max()):
        raise TurbopocketError(
            f"{layer}: fed something else when its block is run by itself than in the whole model",
            hint="please report the model's .json files; the fits absmax and mse need no such run",
        )
