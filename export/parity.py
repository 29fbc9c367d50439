# SPDX-License-Identifier: Apache-2.0
"""The two gaps of an artifact, measured apart on the same pictures: compression and lowering."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..quant.compress import decompressed
from ..quant.formats import CompressedTensor
from ..runtimes.compare import Recorder, compare, compare_call, compare_pictures
from ..runtimes.manifest import Manifest
from ..runtimes.parity import Limits, ParityReport, ParityRow
from ..runtimes.reference import PyTorchRunner, TorchComponent
from ..runtimes.runner import LayerRunner
from ..runtimes.text_to_image import generate
from ..runtimes.tokenizer import Tokenizer
from .families.evidence import Evidence
from .graph import Component

Picture = NDArray[np.uint8]
KINDS = ("float_model", "stored", "artifact")
NO_LIMITS = Limits(max_relative_error=math.inf)
GAP_STEPS = 4


@dataclass(frozen=True)
class Pictures:
    """The same prompts and seeds drawn three times; lists of uint8 [H, W, 3]."""

    float_model: list[Picture]
    stored: list[Picture]
    artifact: list[Picture]


@dataclass(frozen=True)
class Gaps:
    """Three comparisons and the pictures under them.

    `compression`: float PyTorch against PyTorch with the stored weights; it has no limit, it is what the budget
    costs. `lowering`: PyTorch with the stored weights against the artifact; it must pass. `total`: pictures of
    float PyTorch against those of the artifact. `alignment` has a share per set of pictures, or None.
    """

    compression: ParityReport
    lowering: ParityReport
    total: ParityReport
    pictures: Pictures
    alignment: dict[str, float | None]


def torch_runner(components: Sequence[Component]) -> PyTorchRunner:
    """Returns PyTorch behind the runners' interface, for the weights the modules hold when it is asked."""
    return PyTorchRunner(
        {
            component.name: TorchComponent(
                component.module,
                tuple(component.example_inputs),
                component.output_names,
                component.layer_prefix,
            )
            for component in components
        }
    )


@dataclass(frozen=True)
class Session:
    """What runs that are to be compared must share."""

    manifest: Manifest
    tokenizers: Mapping[str, Tokenizer]
    prompts: Sequence[str]
    seed: int

    def draw(self, runner: LayerRunner | Recorder, index: int) -> Picture:
        """Returns picture `index`: its prompt, from the noise of seed + index."""
        return generate(runner, self.manifest, self.tokenizers, self.prompts[index], self.seed + index)


def measure_gaps(
    components: Sequence[Component],
    weights: Mapping[str, CompressedTensor],
    artifact: LayerRunner,
    session: Session,
    max_lowering_error: float,
    evidence: Evidence,
    advance: Callable[[], None],
) -> Gaps:
    """Draws every prompt with the float model, with the stored weights and with the artifact, and compares.

    The modules hold the float weights before and after. `advance` is called after each of the GAP_STEPS steps.
    """
    torch = torch_runner(components)
    indices = range(len(session.prompts))
    recorders = [Recorder(torch) for _ in indices]
    float_pictures = [session.draw(recorder, index) for index, recorder in zip(indices, recorders, strict=True)]
    advance()
    with decompressed({component.name: component.module.model for component in components}, weights):
        stored = [session.draw(torch, index) for index in indices]
        rows = [
            compare_call(torch, call, index, NO_LIMITS)
            for index, recorder in zip(indices, recorders, strict=True)
            for call in recorder.calls
        ]
        advance()
        lowering = compare(
            torch,
            artifact,
            session.manifest,
            session.tokenizers,
            session.prompts,
            session.seed,
            Limits(max_relative_error=max_lowering_error),
            evidence.feature_distance,
        )
        advance()
    drawn = [session.draw(artifact, index) for index in indices]
    advance()
    pictures = Pictures(float_pictures, stored, drawn)
    return Gaps(
        compression=_report(rows, session, stored, float_pictures, evidence),
        lowering=lowering,
        total=_report([], session, drawn, float_pictures, evidence),
        pictures=pictures,
        alignment={name: evidence.alignment(getattr(pictures, name), session.prompts) for name in KINDS},
    )


def _report(
    rows: list[ParityRow],
    session: Session,
    found: Sequence[Picture],
    expected: Sequence[Picture],
    evidence: Evidence,
) -> ParityReport:
    pictures = [
        compare_pictures(one, other, index, session.prompts[index], session.seed + index, evidence.feature_distance)
        for index, (one, other) in enumerate(zip(found, expected, strict=True))
    ]
    return ParityReport(limits=NO_LIMITS, rows=rows, pictures=pictures)
