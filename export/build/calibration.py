# SPDX-License-Identifier: Apache-2.0
"""What the float model draws for the stages of a build, and what its layers see while it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...quant.blockwise import calibrate_to_files
from ...quant.fit import Fit, measuring_fit, parse_fit
from ...quant.observe import OBSERVATIONS, needed_by
from ...quant.store import Kind, StatsStore
from ...runtimes.manifest import Manifest
from ...runtimes.runner import Runner
from ..evidence import read_prompts
from ..verify.gaps import Session, torch_runner
from .bench import Workbench
from .journal import Journal


def calibrated(bench: Workbench, session: Session, journal: Journal) -> StatsStore:
    """Statistics of every layer while the float model draws at the shipped steps and guidance."""
    asked = parse_fit(bench.recipe.compress.fit)
    needed: set[Kind] = {needed_by(asked), needed_by(measuring_fit(asked))}
    pictures, blocks = bench.recipe.calibrate.pictures, bench.blocks

    def make(folder: Path) -> None:
        drawing = calibration_drawing(bench, session, torch_runner(bench.components), pictures, advance)
        calibrate_to_files(bench.modules, blocks, drawing, needed, folder, advance)

    with bench.progress.stage("calibrate", pictures + len(blocks)) as advance:
        return StatsStore(journal.product("calibrate", calibration_inputs(bench, session), make))


def drawing_inputs(session: Session, prompts: Sequence[str], components: Sequence[str]) -> dict[str, Any]:
    """What pictures drawn by the float model depend on, beside model and code.

    Not the target: all draw alike, and what a target ships of their outputs does not change what layers see.
    """
    manifest = session.manifest
    return {
        "prompts": list(prompts),
        "seed": session.seed,
        "sampler": manifest.sampler.model_dump(mode="json"),
        "sizes": [list(size) for size in manifest.sizes],
        "components": list(components),
        "rewrites": [rewrite.name for rewrite in manifest.rewrites],
    }


def calibration_inputs(bench: Workbench, session: Session) -> dict[str, Any]:
    """What statistics depend on, beside model and code."""
    recipe, fit = bench.recipe, parse_fit(bench.recipe.compress.fit)
    return {
        **drawing_inputs(session, calibration_prompts(bench, recipe.calibrate.pictures), list(bench.modules)),
        "decoded_pixels": recipe.calibrate.decoded_pixels,
        "observations": sorted(OBSERVATIONS),
        "whole_hessian": fit.whole_hessian or measuring_fit(fit).whole_hessian,
    }


def fitting_inputs(bench: Workbench, session: Session, journal: Journal, fit: Fit) -> dict[str, Any]:
    """What a layer's stored weight depends on, beside its format, model and code."""
    return {
        "calibration": journal.key("calibrate", calibration_inputs(bench, session)),
        "fit": fit.name,
        "group_scale_digits": fit.group_scale_digits,
    }


def calibration_prompts(bench: Workbench, wanted: int) -> list[str]:
    """So many prompts: those of the recipe's file, over and over, or the model's own."""
    file = bench.recipe.calibrate.prompts
    if file is None:
        return bench.evidence.prompts("calibrate", wanted, bench.recipe.seed)
    own = read_prompts(file)
    return [own[index % len(own)] for index in range(wanted)]


def calibration_drawing(
    bench: Workbench, session: Session, runner: Runner, wanted: int, advance: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """What draws so many pictures of calibration prompts in the runner."""
    drawing = replace(session, prompts=calibration_prompts(bench, wanted))
    few = DecodesFew(runner, session.manifest, bench.recipe.calibrate.decoded_pixels)

    def draw_all() -> None:
        for index in range(wanted):
            drawing.draw(few, index)
            advance()

    return draw_all


class DecodesFew:
    """A runner in which the VAE does not run any more when there have been enough pixels.

    A picture shows a layer of the VAE as many input vectors as it has pixels, and one of the denoiser a 64th of them or
    less: the denoiser asks for more pictures, and the VAE would take most of the time.
    """

    def __init__(self, runner: Runner, manifest: Manifest, pixels: int) -> None:
        self._runner, self._left, self._decodes = runner, pixels, True
        self._decoder, self._encoder, self._image = manifest.pipeline.decoder, manifest.pipeline.encoder, manifest.image

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs; a black picture when it is not decoded, and nothing that an encoder says of it."""
        if component == self._decoder.component:
            batch, _, height, width = inputs[self._decoder.latents].shape
            height *= self._image.height // self._image.latent_height
            width *= self._image.width // self._image.latent_width
            self._decodes, self._left = self._left > 0, self._left - batch * height * width
            if not self._decodes:
                return {self._decoder.output: np.zeros((batch, 3, height, width), np.float32)}
        elif self._encoder is not None and component == self._encoder.component and not self._decodes:
            return {}
        return self._runner.run(component, inputs)
