# SPDX-License-Identifier: Apache-2.0
"""A few points of the sampling trajectory at which the harm of a perturbed layer is felt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...runtimes.compare.replay import Call, Recorder
from ...runtimes.drawing.conditioning import condition, feed
from ...runtimes.drawing.latents import encoded_mean
from ...runtimes.runner import Runner
from ..verify.gaps import Session


@dataclass(frozen=True)
class Probe:
    """Inputs recorded while the float model drew the prompts of `session`, batched.

    `denoiser_inputs` has len(prompts) x steps rows, prompt-major; `latents` [B, C, h, w] are the clean ones, `samples`
    [B, 3, H, W] the pictures that the encoder read, if there is one.
    """

    runner: Runner
    session: Session
    denoiser_inputs: Arrays
    latents: NDArray[np.float32]
    samples: NDArray[np.float32] | None

    def outputs_after(self, component: str) -> Callable[[], list[torch.Tensor]]:
        """Returns a function that runs whatever lies behind a layer of `component`, up to where harm is compared.

        That is the denoiser's prediction for text encoders and the UNet, the picture for the VAE decoder, and for the
        VAE encoder the middle of the latents, whose variance hardly matters.
        """
        pipeline = self.session.manifest.pipeline
        denoiser, decoder, encoder = pipeline.denoiser.component, pipeline.decoder, pipeline.encoder
        if encoder is not None and component == encoder.component:
            assert self.samples is not None
            sample = {encoder.picture: self.samples}
            return lambda: [torch.from_numpy(encoded_mean(encoder, self.runner.run(component, sample)))]
        if component == decoder.component:
            return lambda: self._run(component, {decoder.latents: self.latents})
        if component == denoiser:
            return lambda: self._run(denoiser, self.denoiser_inputs)
        return lambda: self._run(denoiser, self.denoiser_inputs | self._conditions())

    def _run(self, component: str, inputs: Arrays) -> list[torch.Tensor]:
        return [torch.from_numpy(value) for value in self.runner.run(component, inputs).values()]

    def _conditions(self) -> Arrays:
        drawing = self.session
        each = [condition(self.runner, drawing.manifest, drawing.tokenizers, [prompt]) for prompt in drawing.prompts]
        denoiser = drawing.manifest.pipeline.denoiser
        steps = len(self.denoiser_inputs[denoiser.latents]) // len(each)
        rows = {name: np.repeat(np.concatenate([values[name] for values in each]), steps, axis=0) for name in each[0]}
        return feed(drawing.manifest, denoiser.component, rows)


def make_probe(session: Session, runner: Runner, steps: int) -> Probe:
    """Draws every prompt of the session once; returns a Probe at up to `steps` timesteps of each drawing."""
    pipeline = session.manifest.pipeline
    rows: list[Arrays] = []
    latents: list[NDArray[Any]] = []
    samples: list[NDArray[Any]] = []
    for index in range(len(session.prompts)):
        recorder = Recorder(runner)
        session.draw(recorder, index)
        asked = _conditional_calls(recorder.calls, pipeline.denoiser.component)
        rows += [asked[at].inputs for at in np.unique(np.linspace(0, len(asked) - 1, steps).round().astype(int))]
        for call in recorder.calls:
            if call.component == pipeline.decoder.component:
                latents.append(call.inputs[pipeline.decoder.latents])
            if pipeline.encoder is not None and call.component == pipeline.encoder.component:
                samples.append(call.inputs[pipeline.encoder.picture])
    batched = {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}
    return Probe(runner, session, batched, np.concatenate(latents), np.concatenate(samples) if samples else None)


def _conditional_calls(calls: Sequence[Call], denoiser: str) -> list[Call]:
    """The denoiser's first call of each timestep: with guidance the conditional one is asked first."""
    first: dict[float | None, Call] = {}
    for call in calls:
        if call.component == denoiser:
            first.setdefault(call.timestep, call)
    return list(first.values())
