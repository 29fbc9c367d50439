# SPDX-License-Identifier: Apache-2.0
"""A plan carried out block by block: each block is fitted to inputs that the stored blocks before it cause.

Egiazarian et al., VQDM (2024), section 3.3: the Hessians of the next block are collected with the quantized prefix in
place, so that a fit counts what the model will see and not what it saw before it was compressed.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from .calibrate import calibrate
from .compress import compress, decompressed
from .fit import Fit
from .formats import CompressedTensor
from .observe import LayerStats, needed_by
from .plan import Choice, Plan
from .store import load_weights, save_weights
from .workers import Spread, in_turn


def compress_in_blocks(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    plan: Plan,
    fit: Fit,
    stats: Mapping[str, LayerStats],
    block_of: Callable[[str], str],
    run: Callable[[], object],
    checkpoints: Path,
    spread: Spread = in_turn,
) -> dict[str, CompressedTensor]:
    """Like `compress`, in the plan's order, but with statistics collected anew for each block while `run()` draws.

    Blocks are the layers of one `block_of` name, in the order in which `stats` has the first of them (that in which
    they run). Each finished block is a file in `checkpoints`; a later call with the same arguments reads those that
    are there, and gives the same bytes as a call that was never cut short. The modules hold their own weights
    afterwards. Raises TurbopocketError as `compress` does, and for a damaged checkpoint.
    """
    choices = {choice.layer: choice for choice in plan.choices}
    blocks: dict[str, list[Choice]] = {}
    for name in [name for name in stats if name in choices] + [name for name in choices if name not in stats]:
        blocks.setdefault(block_of(name), []).append(choices[name])
    checkpoints.mkdir(parents=True, exist_ok=True)
    stored: dict[str, CompressedTensor] = {}
    with ExitStack() as prefix:
        for index, (block, members) in enumerate(blocks.items()):
            file = checkpoints / f"{index:03}-{block}.safetensors"
            if file.is_file():
                weights = load_weights(file)
            else:
                own = {choice.layer: layers[choice.layer] for choice in members}
                # Nothing of the model has changed before the first block.
                seen = calibrate(modules, run, set(own), (needed_by(fit),)) if index else stats
                weights = compress(own, replace(plan, choices=tuple(members)), fit, seen, spread)
                save_weights(file, weights)
            prefix.enter_context(decompressed(modules, weights))
            stored |= weights
    return {name: stored[name] for name in choices}
