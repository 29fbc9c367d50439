# SPDX-License-Identifier: Apache-2.0
"""Does a runtime compute what PyTorch computes? Measured call by call on the same inputs, then on pictures.

Each call is replayed with the reference's own inputs, so an error belongs to the component and step it is
listed under; the pictures show what all errors together come to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays, check_names
from ..drawing.text_to_image import NotFinite, exercise, generate
from ..drawing.tokenizer import Tokenizer
from ..manifest import Manifest
from ..runner import LayerRunner, Runner
from .metrics import max_abs_error, psnr_db, relative_error, snr_db, ssim
from .rows import Divergence, Limits, ParityReport, ParityRow, PictureRow

__all__ = [
    "Call",
    "Divergence",
    "FeatureDistance",
    "Limits",
    "ParityReport",
    "ParityRow",
    "Picture",
    "PictureRow",
    "Recorder",
    "Recording",
    "Reference",
    "compare",
    "compare_by_layer",
    "compare_call",
    "compare_outputs",
    "compare_pictures",
    "divergence_among",
    "first_divergence",
    "locate_divergence",
    "record",
]

Picture = NDArray[np.uint8]
FeatureDistance = Callable[[Picture, Picture], float | None]
"""How far apart a network finds two pictures [H, W, 3]: 0 when they look the same to it, None when it reads no pictures
of that size."""


class Reference(LayerRunner, Protocol):
    """A runner that is right by definition and knows the names of its layers."""

    def layers(self, component: str) -> list[str]:
        """Names of the layers that `run_layers` can show."""
        ...

    def run_following(
        self, component: str, inputs: Mapping[str, NDArray[Any]], followed: Mapping[str, NDArray[Any]]
    ) -> tuple[Arrays, Arrays]:
        """Outputs of the component and of the layers; each layer in `followed` hands on that value, not its own."""
        ...


@dataclass(frozen=True)
class Call:
    """One run of a component: what went in and what came out."""

    component: str
    inputs: Arrays
    outputs: Arrays

    @property
    def timestep(self) -> float | None:
        """The training timestep of a UNet call, None for other components."""
        return float(self.inputs["timestep"].flat[0]) if "timestep" in self.inputs else None


@dataclass
class Recorder:
    """A runner that remembers every call made through it."""

    runner: Runner
    calls: list[Call] = field(default_factory=list)

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the runner behind it gives, now also in `calls`."""
        outputs = self.runner.run(component, inputs)
        self.calls.append(Call(component, dict(inputs), outputs))
        return outputs


@dataclass(frozen=True)
class Recording:
    """One picture of the reference, and every call that led to it."""

    prompt: str
    seed: int
    picture: Picture
    calls: list[Call]


def record(
    reference: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompts: Sequence[str],
    seed: int,
    pictures: slice = slice(None),
) -> list[Recording]:
    """One recording per prompt, drawn by the reference from seed, seed + 1, …, the artifact's sizes in turn.

    `pictures` are those wanted of them.
    """
    recordings = []
    for index, prompt in list(enumerate(prompts))[pictures]:
        recorder = Recorder(reference)
        picture = exercise(recorder, manifest.of_picture(index), tokenizers, [prompt], [seed + index])[0]
        recordings.append(Recording(prompt, seed + index, picture, recorder.calls))
    return recordings


def compare(
    reference: Reference,
    recordings: Sequence[Recording],
    candidate: LayerRunner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    limits: Limits,
    feature_distance: FeatureDistance | None = None,
) -> tuple[ParityReport, list[Picture | None]]:
    """The report on the reference's recordings, and the candidate's own pictures (None where they are not finite).

    When calls fail, the first of them is opened up to name the first diverging layer.
    """
    rows: list[ParityRow] = []
    pictures: list[PictureRow] = []
    drawn: list[Picture | None] = []
    divergence: Divergence | None = None
    failed = False
    for index, recording in enumerate(recordings):
        for call in recording.calls:
            if limits.by_layer:
                found = candidate.run(call.component, call.inputs)
                row, first = compare_by_layer(reference, candidate, call, found, index, limits)
                divergence = divergence or first
            else:
                row = compare_call(candidate, call, index, limits)
                if not failed and not row.passed:
                    divergence = locate_divergence(reference, candidate, call, limits.max_relative_error)
            failed = failed or not row.passed
            rows.append(row)
        try:
            at_its_size = manifest.of_picture(index)
            drawn.append(generate(candidate, at_its_size, tokenizers, recording.prompt, recording.seed))
        except NotFinite:
            drawn.append(None)
        about = index, recording.prompt, recording.seed
        pictures.append(compare_pictures(drawn[-1], recording.picture, *about, feature_distance))
    return ParityReport(limits=limits, rows=rows, pictures=pictures, first_divergence=divergence), drawn


def compare_call(candidate: Runner, call: Call, picture: int, limits: Limits) -> ParityRow:
    """The row of a recorded call replayed on `candidate`; TurbopocketError when outputs' names differ."""
    return compare_outputs(call, candidate.run(call.component, call.inputs), call.outputs, picture, limits)


def compare_outputs(call: Call, outputs: Arrays, expected: Arrays, picture: int, limits: Limits) -> ParityRow:
    """The row of two sets of outputs of one call's inputs; TurbopocketError when outputs' names differ."""
    check_names(call.component, "outputs", list(expected), list(outputs))
    errors = {name: relative_error(outputs[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    return ParityRow(
        picture=picture,
        component=call.component,
        timestep=call.timestep,
        output=worst,
        max_abs_error=max_abs_error(outputs[worst], expected[worst]),
        relative_error=errors[worst],
        snr_db=_finite(snr_db(outputs[worst], expected[worst])),
        max_relative_error=limits.max_relative_error,
    )


def compare_by_layer(
    reference: Reference, candidate: LayerRunner, call: Call, found: Arrays, picture: int, limits: Limits
) -> tuple[ParityRow, Divergence | None]:
    """The row of the worst layer or output of a call, each on equal inputs, and the first layer over the limit.

    `found` are the candidate's outputs. The reference goes on from the candidate's output of every layer. A layer that
    the candidate does not show keeps the reference's, and what it does wrong is found behind it.
    """
    shown = candidate.run_layers(call.component, call.inputs, reference.layers(call.component))
    expected, own = reference.run_following(call.component, call.inputs, shown)
    rows = [compare_outputs(call, found, expected, picture, limits)]
    for layer in (layer for layer in own if layer in shown):
        fits = shown[layer].shape == own[layer].shape
        value = shown[layer] if fits else np.full_like(own[layer], np.inf)  # a layer of another shape is all wrong
        rows.append(compare_outputs(call, {layer: value}, {layer: own[layer]}, picture, limits))
    return max(rows, key=lambda row: row.relative_error), first_divergence(call, own, shown, limits.max_relative_error)


def compare_pictures(
    found: Picture | None,
    expected: Picture,
    picture: int,
    prompt: str,
    seed: int,
    feature_distance: FeatureDistance | None = None,
) -> PictureRow:
    """The row of two pictures of one prompt and seed; `found` is None when the runtime's is not finite."""
    if found is None:
        return PictureRow(picture=picture, prompt=prompt, seed=seed, psnr_db=-math.inf, ssim=0.0)
    return PictureRow(
        picture=picture,
        prompt=prompt,
        seed=seed,
        psnr_db=_finite(psnr_db(found, expected)),
        ssim=ssim(found, expected),
        feature_distance=None if feature_distance is None else feature_distance(found, expected),
    )


def locate_divergence(
    reference: Reference, candidate: LayerRunner, call: Call, max_relative_error: float
) -> Divergence | None:
    """The first diverging layer of a recorded call, run again on both sides with all layers shown."""
    return divergence_among(reference.layers(call.component), reference, candidate, call, max_relative_error)


def divergence_among(
    layers: Sequence[str], reference: LayerRunner, candidate: LayerRunner, call: Call, max_relative_error: float
) -> Divergence | None:
    """The first of `layers` to diverge in a recorded call, run again on both sides with all of them shown."""
    expected = reference.run_layers(call.component, call.inputs, layers)
    found = candidate.run_layers(call.component, call.inputs, layers)
    return first_divergence(call, expected, found, max_relative_error)


def first_divergence(call: Call, expected: Arrays, found: Arrays, max_relative_error: float) -> Divergence | None:
    """The first layer over the limit, in the order of `expected`, which is that of execution.

    Layers that only one side shows are passed over; one of another shape has diverged by inf.
    """
    for layer, reference in expected.items():
        if layer not in found:
            continue
        same_shape = found[layer].shape == reference.shape
        error = relative_error(found[layer], reference) if same_shape else math.inf
        if error > max_relative_error:
            return Divergence(
                component=call.component,
                timestep=call.timestep,
                layer=layer,
                relative_error=error,
                max_abs_error=max_abs_error(found[layer], reference) if same_shape else math.inf,
            )
    return None


def _finite(decibels: float) -> float | None:
    """None for the infinite dB of equal values, which JSON has no number for."""
    return None if decibels == math.inf else decibels
