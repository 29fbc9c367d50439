# SPDX-License-Identifier: Apache-2.0
"""The self-check of an artifact: its place before the plan is made, and what it holds once the artifact runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...ground.errors import ParityFailed
from ...runtimes.compare.reference import PyTorchRunner
from ...runtimes.compare.self_check import Outputs, first_latents, outputs_of
from ...runtimes.manifest import Manifest
from ...runtimes.pipeline import ExpectedOutput, SelfCheck
from ..verify.gaps import Runtime, Session
from .bench import Workbench

MOST_STEPS = 4
"""A device may be slow, and a kernel that computes wrong does so at every step."""
FLOOR_DB = 20.0
"""A difference of a tenth. A right device may round activations to eight bits where another does not."""
MARGIN_DB = 6.0
"""What a device may lose to the worst runtime here, where that itself is not far above `FLOOR_DB`: twice its error."""
_WIDEST = -1000.5
_FOLDER = "self_check"


def with_self_check(bench: Workbench, session: Session, artifact: Path) -> Workbench:
    """The same, whose draft has a self-check of the session's first prompt; its files are there and hold zeros.

    So the plan counts its bytes.
    """
    table = bench.draft.sampler_table
    assert table is not None
    blank = {"snr_floor_db": _WIDEST}
    spec = SelfCheck(
        prompt=session.prompts[0],
        seed=session.seed,
        step=min(MOST_STEPS, len(table.rows)) - 1,
        latents=ExpectedOutput(file=f"{_FOLDER}/latents.f32", **blank),
        picture=ExpectedOutput(file=f"{_FOLDER}/picture.rgb", **blank),
    )
    Outputs.blank(bench.draft.image).write(artifact, spec)
    return replace(bench, draft=bench.draft.model_copy(update={"self_check": spec}))


def record_self_check(
    draft: Manifest, session: Session, reference: PyTorchRunner, runtimes: Mapping[str, Runtime], artifact: Path
) -> Manifest:
    """The draft with the floors of its self-check, whose files now hold what the reference computes.

    A floor is `FLOOR_DB`, or `MARGIN_DB` below the worst of the runtimes where that is less. All have passed the
    comparison with PyTorch before. Raises ParityFailed for pictures with numbers that are not finite.
    """
    spec = draft.self_check
    assert spec is not None
    asked = draft, session.tokenizers, spec
    expected = outputs_of(reference, *asked)
    first = first_latents(draft, spec)
    found = [outputs_of(runtime.runner, *asked).snr_db(expected, first) for runtime in runtimes.values()]
    if any(each["picture"] == -math.inf for each in found):
        raise ParityFailed(f"the picture after step {spec.step} of the self-check is not finite")
    expected.write(artifact, spec)
    worst = {name: min(each[name] for each in found) for name in spec.outputs}
    floors = {
        name: each.model_copy(update={"snr_floor_db": _floor_db(worst[name])}) for name, each in spec.outputs.items()
    }
    return draft.model_copy(update={"self_check": spec.model_copy(update=floors)})


def _floor_db(worst: float) -> float:
    return math.floor(10 * min(FLOOR_DB, worst - MARGIN_DB)) / 10
