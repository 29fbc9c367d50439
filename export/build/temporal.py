# SPDX-License-Identifier: Apache-2.0
"""The denoiser's temporal features in a build: what they are computed from, and what the shipped plan does to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.names import current_place
from ...quant.compress import decompressed
from ...quant.formats import CompressedTensor
from ...quant.layer_rounding import Rounding, rounded_layers
from ...quant.plan import Plan
from ...quant.ranges import Ranges
from ...quant.temporal import TemporalBlock, temporal_block
from ...quant.temporal_errors import TemporalCall, feature_errors
from ...runtimes.manifest import Manifest
from ...runtimes.runner import Runner
from ..families.graphs import Component
from ..report.page import FeatureRow, TemporalFigures
from ..verify.gaps import Session, torch_runner
from .bench import Workbench
from .calibration import DecodesFew

MOST_CALLS = 64
"""Of the denoiser whose features are reported: each is compared with fourteen other timesteps."""


def denoiser_of(components: Sequence[Component], manifest: Manifest) -> Component:
    """The component that is asked at every step."""
    return next(each for each in components if each.name == manifest.pipeline.denoiser.component)


def temporal_inputs(components: Sequence[Component], session: Session, prompts: Sequence[str]) -> list[TemporalCall]:
    """What temporal features are computed from while pictures of these prompts are drawn, equal calls once.

    The denoiser does not run: features do not depend on latents, so that it may as well predict nothing.
    """
    runner = _WithoutDenoiser(torch_runner(components), session.manifest)
    drawing = replace(session, prompts=prompts)
    for index in range(len(prompts)):
        drawing.draw(DecodesFew(runner, session.manifest, 0), index)
    return runner.calls


class _WithoutDenoiser:
    """A runner that keeps what the denoiser is told beside latents, in the place of running it."""

    def __init__(self, runner: Runner, manifest: Manifest) -> None:
        self._runner, self._denoiser = runner, manifest.pipeline.denoiser
        self._known: set[bytes] = set()
        self.calls: list[TemporalCall] = []

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs; zeros for the denoiser's."""
        if component != self._denoiser.component:
            return self._runner.run(component, inputs)
        told = {name: value for name, value in inputs.items() if name != self._denoiser.latents}
        key = b"".join(value.tobytes() for value in told.values())
        if key not in self._known:
            self._known.add(key)
            tensors = {name: torch.from_numpy(np.array(value)) for name, value in told.items()}
            self.calls.append(TemporalCall(current_place(), tensors))
        batch, channels, *sides = inputs[self._denoiser.latents].shape
        channels *= 1 if self._denoiser.channels == "all" else 2
        return {self._denoiser.output: np.zeros((batch, channels, *sides), np.float32)}


def found_block(components: Sequence[Component], manifest: Manifest, call: TemporalCall) -> TemporalBlock:
    """The denoiser's temporal information block, for inputs of the shapes of this call."""
    denoiser, names = denoiser_of(components, manifest), manifest.pipeline.denoiser
    examples = {
        name: call.inputs[name] if name in call.inputs else tensor[:1]
        for name, tensor in denoiser.example_inputs.items()
    }
    own = denoiser.module
    return temporal_block(denoiser.name, own, examples, names.latents, names.timestep, own.model)


def with_features(block: TemporalBlock, calls: Sequence[TemporalCall]) -> list[TemporalCall]:
    """The calls with those inputs alone that features depend on, equal ones once."""
    found: dict[bytes, TemporalCall] = {}
    for call in calls:
        own = {name: call.inputs[name] for name in block.inputs}
        key = b"".join(value.numpy().tobytes() for value in own.values())
        found.setdefault(key, replace(call, inputs=own))
    return list(found.values())


def temporal_figures(
    bench: Workbench,
    session: Session,
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    ranges: Mapping[str, Ranges],
) -> TemporalFigures | None:
    """The temporal block, and what the plan does to each feature at each step; None where there are no features."""
    with bench.progress.stage("temporal"):
        steps = len(session.manifest.sampler.timesteps or ()) or 1
        told = temporal_inputs(bench.components, session, session.prompts[: max(1, MOST_CALLS // steps)])
        block = found_block(bench.components, session.manifest, told[0])
        if not block.ends:
            return None
        denoiser = denoiser_of(bench.components, session.manifest)
        own = {name: bench.layers[name] for name in block.layers}
        schemes = decided.schemes
        roundings = {name: Rounding.of(name, schemes[name], ranges) for name in own}

        @contextmanager
        def quantized() -> Iterator[None]:
            with decompressed(bench.modules, stored), rounded_layers(own, roundings):
                yield

        calls = with_features(block, told)
        timestep = session.manifest.pipeline.denoiser.timestep
        rows = feature_errors(block, denoiser.module, own, calls, timestep, quantized)
    features = tuple(FeatureRow(**asdict(each)) for each in rows)
    return TemporalFigures(layers=block.layers, inputs=block.inputs, share=block.share, features=features)
