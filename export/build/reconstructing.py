# SPDX-License-Identifier: Apache-2.0
"""The fit `reconstruct` in a build: layers are stored, then the rounding of the denoiser's is learned by block."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...quant.block_inputs import CALLS_FILE, BlockInputs
from ...quant.calibrate import ranges_of
from ...quant.fit import RECONSTRUCT, parse_fit
from ...quant.formats import CompressedTensor
from ...quant.layer_rounding import Rounding
from ...quant.observe import LayerStats
from ...quant.plan import Plan
from ...quant.reconstruct import is_learned
from ...quant.reconstruct_blocks import TemporalUnit, errors_in, reconstruct_to_files, reconstructed_in
from ...quant.store import OverlaidStore
from ..families.components import component_name
from ..verify.gaps import Session, torch_runner
from .bench import Workbench
from .calibration import DecodesFew, calibration_prompts, fitting_inputs
from .journal import Journal
from .temporal import denoiser_of, found_block, temporal_inputs, with_features

INPUTS_FOLDER = "inputs"


def reconstruction_inputs(bench: Workbench, decided: Plan) -> dict[str, Any]:
    """What learned rounding depends on, beside what stored weights do; nothing for other fits."""
    if bench.recipe.compress.fit != RECONSTRUCT.name:
        return {}
    return {
        "reconstruct": asdict(bench.recipe.reconstruct),
        "seed": bench.recipe.seed,
        "schemes": {choice.layer: choice.scheme for choice in decided.choices},
    }


def reconstructed(
    bench: Workbench,
    session: Session,
    stats: Mapping[str, LayerStats],
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    journal: Journal,
) -> tuple[Mapping[str, CompressedTensor], dict[str, tuple[float, float]]]:
    """The stored weights with learned rounding where the recipe's fit asks for it, and each unit's errors.

    What the denoiser's blocks are called with lies in files until all of them are done.
    """
    asked = reconstruction_inputs(bench, decided)
    if not asked:
        return stored, {}
    denoiser, pictures = denoiser_of(bench.components, session.manifest), bench.recipe.calibrate.pictures
    blocks = denoiser.blocks()
    layers = {name: layer for name, layer in bench.layers.items() if component_name(name) == denoiser.name}
    ranges, schemes = ranges_of(stats), decided.schemes
    if others := sum(not is_learned(schemes[name].weight) for name in layers):
        bench.progress.remark(
            f"note: reconstruct: {others} of {len(layers)} layers of {denoiser.name} are no integers, and stay so"
        )

    def make(folder: Path) -> None:
        drawing = replace(session, prompts=calibration_prompts(bench, pictures))
        runner = DecodesFew(torch_runner(bench.components), session.manifest, 0)
        inputs = BlockInputs(folder / INPUTS_FOLDER)
        if not (folder / INPUTS_FOLDER / CALLS_FILE).is_file():
            with inputs.recording(blocks, layers):
                for index in range(pictures):
                    drawing.draw(runner, index)
        told = temporal_inputs(bench.components, session, drawing.prompts)
        block = found_block(bench.components, session.manifest, told[0])
        temporal = TemporalUnit(block, denoiser.module, layers, with_features(block, told))
        roundings = {name: Rounding.of(name, schemes[name], ranges) for name in layers}
        how = bench.recipe.reconstruct, bench.recipe.seed
        reconstruct_to_files(blocks, temporal, inputs, stored, roundings, *how, folder, advance)
        shutil.rmtree(folder / INPUTS_FOLDER)

    with bench.progress.stage("reconstruct", len(blocks)) as advance:
        fitting = fitting_inputs(bench, session, journal, bench.fit(parse_fit(bench.recipe.compress.fit)))
        folder = journal.product("reconstruct", {**fitting, **asked}, make)
    return OverlaidStore(stored, reconstructed_in(folder)), errors_in(folder)
