# SPDX-License-Identifier: Apache-2.0
"""Codes of codebooks chosen anew, among candidates, by what blocks give; see `quant.candidate_training`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ground.arrays import Arrays
from ...quant.candidate_training import BlockLosses, train_in_blocks, trained_blocks
from ...quant.formats import CompressedTensor
from ...quant.observe import LayerStats
from ...runtimes.compare.replay import Recorder
from ..verify.gaps import Session, torch_runner
from .bench import Workbench
from .calibration import calibration_drawing
from .journal import Journal


def with_candidates(
    bench: Workbench,
    session: Session,
    weights: Mapping[str, CompressedTensor],
    stats: Mapping[str, LayerStats],
    inputs: Mapping[str, Any],
    journal: Journal,
) -> tuple[Mapping[str, CompressedTensor], dict[str, BlockLosses]]:
    """The weights after training of their candidates, with the biases that it changed, if the recipe asks for it.

    `inputs` are what the weights that are given depend on. Each block is a file.
    """
    asked = bench.recipe.candidates
    if not asked.count:
        return weights, {}
    blocks, order = bench.blocks, [*stats, *(name for name in bench.layers if name not in stats)]
    trained = trained_blocks(blocks, weights, order)
    with bench.progress.stage("candidates", len(trained)) as advance:
        folder = journal.store("candidates", {**inputs, "candidates": asdict(asked)})
        drawn = partial(calls_of, bench, session, asked.pictures)
        what = bench.modules, blocks, bench.layers, weights, order, drawn, asked
        stored, losses = train_in_blocks(*what, folder, bench.recipe.seed, advance)
    bench.progress.remark(f"note: {_told(losses)}")
    return stored, losses


def _told(losses: Mapping[str, BlockLosses]) -> str:
    if not losses:
        return "no layer is stored as vectors of a codebook, so there were no candidates to train"
    means = [sum(getattr(each, name) for each in losses.values()) / len(losses) for name in BlockLosses.__annotations__]
    before, soft, hard, after = (f"{mean:.3g}" for mean in means)
    return (
        f"candidates of {len(losses)} blocks, mean relative error on calls held out: {before} before, {soft} mixed, "
        f"{hard} hardened, {after} in the end"
    )


def calls_of(bench: Workbench, session: Session, pictures: int, name: str) -> list[Callable[[], object]]:
    """A component's calls while so many calibration pictures are drawn with what the modules hold now."""
    recorder = Recorder(torch_runner(bench.components))
    calibration_drawing(bench, session, recorder, pictures)()
    component = next(each for each in bench.components if each.name == name)
    own = [call for call in recorder.calls if call.component == name]
    return [partial(component.module, *as_tensors(call.inputs, component.example_inputs)) for call in own]


def as_tensors(arrays: Arrays, names: Iterable[str]) -> list[Tensor]:
    """Those arrays, in that order."""
    return [torch.from_numpy(arrays[name]) for name in names]
