# SPDX-License-Identifier: Apache-2.0
"""A slow runtime's own picture, checked call by call: what goes into each of its calls is given to quick ones as well.

The other way round than `compare`, which replays the reference's calls on the candidate and draws a picture on top.
Here every slow call counts for both, and an error still belongs to the component and step it is listed under.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..drawing.text_to_image import NotFinite, exercise
from ..drawing.tokenizer import Tokenizer
from ..manifest import Manifest
from ..runner import LayerRunner, Runner
from .replay import (
    Call,
    Limits,
    ParityReport,
    Picture,
    Recorder,
    Reference,
    compare_by_layer,
    compare_outputs,
    divergence_among,
)


def draw_recorded(
    candidate: Runner, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], prompt: str, seed: int, steps: int
) -> tuple[Picture | None, list[Call]]:
    """The candidate's picture, None where it is not finite, and every call that led to it."""
    recorder = Recorder(candidate)
    try:
        return exercise(recorder, manifest, tokenizers, [prompt], [seed], steps)[0], recorder.calls
    except NotFinite:
        return None, recorder.calls


def crosscheck(
    candidate: LayerRunner,
    calls: Sequence[Call],
    other: LayerRunner,
    names: Reference,
    limits: Limits,
    ceilings: Mapping[str, float] = MappingProxyType({}),
) -> ParityReport:
    """The report of the candidate's calls, whose inputs `other` is given too and is right about.

    When calls fail, the first of them is opened up to name the first diverging of the layers that `names` knows. Limits
    that hold by layer are those to `names`, which is then `other` as well. Errors of the components in `ceilings` must
    not be over those either.
    """
    rows, divergence = [], None
    for call in calls:
        allowed = min(limits.max_relative_error, ceilings.get(call.component, limits.max_relative_error))
        own = limits.model_copy(update={"max_relative_error": allowed})
        if limits.by_layer:
            row, first = compare_by_layer(names, candidate, call, call.outputs, 0, own)
            rows.append(row)
            divergence = divergence or first
            continue
        rows.append(compare_outputs(call, call.outputs, other.run(call.component, call.inputs), 0, own))
        if not rows[-1].passed and all(row.passed for row in rows[:-1]):
            divergence = divergence_among(names.layers(call.component), other, candidate, call, allowed)
    return ParityReport(limits=limits, rows=rows, pictures=[], first_divergence=divergence)
