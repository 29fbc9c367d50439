# SPDX-License-Identifier: Apache-2.0
"""A few points of the sampling trajectory at which the harm of a perturbed layer is felt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ground.arrays import Arrays
from ...quant.row_losses import RowwiseOutput
from ...runtimes.compare.replay import Call, Recorder
from ...runtimes.manifest import Manifest
from ...runtimes.pipeline import Pipeline, TextFeed
from ..families.graphs import Component
from ..verify.gaps import Session, torch_runner
from .walk import rows_of

PROBE_PROMPTS = 3
PROBE_STEPS = 4
LATENT_SIDE = 32
"""Of what is decoded at most, a crop from the middle: convolutions are the same everywhere, and gradients of a block
of the decoder at 512 x 512 pixels take gigabytes."""


@dataclass(frozen=True)
class Probe:
    """Inputs recorded while the float model drew some prompts, a row each, and what lies behind them as modules.

    `denoiser_inputs` has len(prompts) x steps rows, prompt-major, and so has `prompts`, the inputs of each text encoder
    by its name; `latents` [B, C, h, w] are the clean ones, `samples` [B, 3, H, W] the pictures that the encoder read,
    if there is one, both the middle of them where they are large.
    """

    components: Mapping[str, Component]
    pipeline: Pipeline
    prompts: Mapping[str, Arrays]
    denoiser_inputs: Arrays
    latents: NDArray[np.float32]
    samples: NDArray[np.float32] | None

    def outputs(self) -> list[tuple[tuple[str, ...], RowwiseOutput]]:
        """Returns where harm is compared, each with the components whose layers are felt there.

        That is the denoiser's prediction for text encoders and the denoiser itself, the picture for the VAE decoder,
        and for the VAE encoder the middle of the latents, whose variance hardly matters.
        """
        denoiser, decoder, encoder = self.pipeline.denoiser, self.pipeline.decoder, self.pipeline.encoder
        predicting = (*self.pipeline.text_encoders, denoiser.component)
        timesteps = self.denoiser_inputs[denoiser.timestep].tolist()
        found = [
            (predicting, self._rowwise(predicting, len(timesteps), self._prediction, timesteps)),
            ((decoder.component,), self._rowwise((decoder.component,), len(self.latents), self._picture)),
        ]
        if encoder is not None:
            assert self.samples is not None
            read = (encoder.component,)
            found.append((read, self._rowwise(read, len(self.samples), self._middle)))
        return found

    def _rowwise(
        self,
        names: Sequence[str],
        rows: int,
        run: Callable[[slice], Tensor],
        timesteps: Sequence[float] | None = None,
    ) -> RowwiseOutput:
        blocks = [block for name in names for block in self.components[name].blocks().values()]
        return RowwiseOutput(rows, run, blocks, timesteps=timesteps)

    def _prediction(self, rows: slice) -> Tensor:
        read = {name: self._run(name, rows_of(inputs, rows)) for name, inputs in self.prompts.items()}
        denoiser = self.pipeline.denoiser
        inputs = rows_of(self.denoiser_inputs, rows)
        for name, feed in denoiser.inputs.items():
            if isinstance(feed, TextFeed):
                inputs[name] = torch.cat([read[each.component][each.output] for each in feed.join], dim=-1)
        output = self._run(denoiser.component, inputs)[denoiser.output]
        return output if denoiser.channels == "all" else output[:, : output.shape[1] // 2]

    def _picture(self, rows: slice) -> Tensor:
        decoder = self.pipeline.decoder
        return self._run(decoder.component, rows_of({decoder.latents: self.latents}, rows))[decoder.output]

    def _middle(self, rows: slice) -> Tensor:
        encoder = self.pipeline.encoder
        assert encoder is not None
        assert self.samples is not None
        output = self._run(encoder.component, rows_of({encoder.picture: self.samples}, rows))[encoder.output]
        return output if encoder.gives == "latents" else output.chunk(2, dim=1)[0]

    def _run(self, component: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self.components[component]
        outputs = graph.module(*(inputs[name] for name in graph.example_inputs))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip(graph.output_names, outputs, strict=True))


def make_probe(
    session: Session, components: Sequence[Component], steps: int, advance: Callable[[], None] = lambda: None
) -> Probe:
    """Draws every prompt of the session once; returns a Probe at up to `steps` timesteps of each.

    `advance` is called after each.
    """
    pipeline = session.manifest.pipeline
    runner = torch_runner(components)
    rows: list[Arrays] = []
    prompts: dict[str, list[Arrays]] = {name: [] for name in pipeline.text_encoders}
    latents: list[NDArray[Any]] = []
    samples: list[NDArray[Any]] = []
    for index in range(len(session.prompts)):
        recorder = Recorder(runner)
        session.draw(recorder, index)
        asked = _conditional_calls(recorder.calls, pipeline.denoiser.component)
        chosen = np.unique(np.linspace(0, len(asked) - 1, steps).round().astype(int))
        rows += [asked[at].inputs for at in chosen]
        for name, read in prompts.items():
            read += [next(call.inputs for call in recorder.calls if call.component == name)] * len(chosen)
        for call in recorder.calls:
            if call.component == pipeline.decoder.component:
                latents.append(call.inputs[pipeline.decoder.latents])
            if pipeline.encoder is not None and call.component == pipeline.encoder.component:
                samples.append(call.inputs[pipeline.encoder.picture])
        advance()
    return Probe(
        {component.name: component for component in components},
        pipeline,
        {name: _batched(read) for name, read in prompts.items()},
        _batched(rows),
        _crop(np.concatenate(latents), LATENT_SIDE),
        _crop(np.concatenate(samples), LATENT_SIDE * _pixels(session.manifest)) if samples else None,
    )


def _pixels(manifest: Manifest) -> int:
    """Along each side of a latent."""
    return manifest.image.height // manifest.image.latent_height


def _crop(pictures: NDArray[Any], side: int) -> NDArray[Any]:
    """A crop of [B, C, H, W] to that many rows and columns at most."""
    for axis in (2, 3):
        length = min(side, pictures.shape[axis])
        start = (pictures.shape[axis] - length) // 2
        pictures = pictures.take(range(start, start + length), axis)
    return pictures


def _batched(rows: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}


def _conditional_calls(calls: Sequence[Call], denoiser: str) -> list[Call]:
    """The denoiser's first call of each timestep: with guidance the conditional one is asked first."""
    first: dict[float | None, Call] = {}
    for call in calls:
        if call.component == denoiser:
            first.setdefault(call.timestep, call)
    return list(first.values())
