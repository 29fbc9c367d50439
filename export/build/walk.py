# SPDX-License-Identifier: Apache-2.0
"""Whole pictures as a function of every layer that has a part in them, for gradients: the loop in PyTorch.

N pictures, C latent channels, h w sides of the latents, H W of the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ...quant.row_losses import RowwiseOutput
from ...runtimes.compare.replay import Call, Recorder
from ...runtimes.drawing.text_to_image import seeded_noise
from ...runtimes.manifest import Manifest
from ...runtimes.pipeline import SamplerRow, SamplerTable, Sum, TextFeed
from ..families.graphs import Component
from ..verify.gaps import Session, torch_runner

MOST_CALLS = 8
"""Of the denoiser for a picture: what all of them have between their blocks is kept at once."""


@dataclass(frozen=True)
class Walk:
    """What a session's pictures are drawn from, a row each: `asked` are the denoiser's inputs step by step, those with
    the prompt and, where guidance asks twice, those without; `ids` the text encoders' inputs; `noise` what the sampler
    is given, in order, the first latents first."""

    components: Mapping[str, Component]
    manifest: Manifest
    ids: Mapping[str, Arrays]
    asked: Sequence[Sequence[Arrays]]
    noise: Sequence[Tensor]

    def pictures(self, rows: slice) -> Tensor:
        """[N, 3, H, W] in 0..1."""
        table = self.manifest.sampler_table
        assert table is not None
        states = self._text_feeds(rows)
        sampler = _Sampler(table, [each[rows] for each in self.noise])
        for halves in self.asked:
            outputs = []
            for number, half in enumerate(halves):
                inputs = rows_of(half, rows)
                inputs |= states if number == 0 else {}
                inputs[self.manifest.pipeline.denoiser.latents] = sampler.latents
                outputs.append(self._predicted(inputs))
            sampler.step(self._guided(outputs))
        return self._decoded(sampler.x)

    def output(self, of: Callable[[Tensor, slice], Tensor] | None = None, energy: float | None = None) -> RowwiseOutput:
        """The pictures, or what `of` makes of those of some rows."""
        blocks = [block for component in self.components.values() for block in component.blocks().values()]
        return RowwiseOutput(len(self.noise[0]), partial(self._seen, of), blocks, energy)

    def _seen(self, of: Callable[[Tensor, slice], Tensor] | None, rows: slice) -> Tensor:
        pictures = self.pictures(rows)
        return pictures if of is None else of(pictures, rows)

    def _text_feeds(self, rows: slice) -> dict[str, Tensor]:
        read = {name: self._run(name, rows_of(inputs, rows)) for name, inputs in self.ids.items()}
        return {
            name: torch.cat([read[each.component][each.output] for each in feed.join], dim=-1)
            for name, feed in self.manifest.pipeline.denoiser.inputs.items()
            if isinstance(feed, TextFeed)
        }

    def _predicted(self, inputs: Mapping[str, Tensor]) -> Tensor:
        denoiser = self.manifest.pipeline.denoiser
        output = self._run(denoiser.component, inputs)[denoiser.output]
        return output if denoiser.channels == "all" else output[:, : output.shape[1] // 2]

    def _guided(self, outputs: Sequence[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        conditional, away = outputs
        return away + self.manifest.sampler.guidance_scale * (conditional - away)

    def _decoded(self, latents: Tensor) -> Tensor:
        image, decoder = self.manifest.image, self.manifest.pipeline.decoder
        if image.latents_std is not None and image.latents_mean is not None:
            mean, std = (torch.tensor(each)[:, None, None] for each in (image.latents_mean, image.latents_std))
            latents = latents * std / image.vae_scaling_factor + mean
        else:
            latents = latents / image.vae_scaling_factor
        sample = self._run(decoder.component, {decoder.latents: latents})[decoder.output]
        return (sample / 2 + 0.5).clamp(0, 1)

    def _run(self, component: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self.components[component]
        outputs = graph.module(*(inputs[name] for name in graph.example_inputs))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return dict(zip(graph.output_names, outputs, strict=True))


class _Sampler:
    """The manifest's table, step by step."""

    def __init__(self, table: SamplerTable, noise: list[Tensor]) -> None:
        self.table, self.noise, self.calls = table, noise, 0
        self.x = noise.pop(0) * table.init_scale
        self.first = self.x
        self.remembered: list[Tensor] = []

    @property
    def row(self) -> SamplerRow:
        return self.table.rows[self.calls]

    @property
    def latents(self) -> Tensor:
        """As the denoiser reads them."""
        return self.x * self.row.input_scale

    def step(self, output: Tensor) -> None:
        step = self.row.steps[min(self.calls, len(self.row.steps) - 1)]
        values = {"x": self.x, "output": output, "first": self.first}
        values |= {f"remembered_{age}": value for age, value in enumerate(self.remembered, 1)}
        if "noise" in step.next:
            values["noise"] = self.noise.pop(0)
        if self.row.estimate is not None:
            assert self.table.bound is not None
            values["estimate"] = _sum(self.row.estimate, values).clamp(-self.table.bound, self.table.bound)
        if step.remember is not None:
            self.remembered = [_sum(step.remember, values), *self.remembered[:2]]
        self.x = _sum(step.next, values)
        self.calls += 1


def require_short(manifest: Manifest) -> None:
    """Raises TurbopocketError for pictures of more than `MOST_CALLS` calls."""
    twice = manifest.sampler.guidance_scale > 1 and not manifest.pipeline.guidance_inputs
    calls = len(manifest.sampler_table.rows if manifest.sampler_table else ()) * (1 + twice)
    if calls > MOST_CALLS:
        raise TurbopocketError(
            f"a picture takes {calls} calls of the denoiser: gradients are taken through {MOST_CALLS} at most",
            hint="measure content layers like the others: leave out compress.content",
        )


def make_walk(session: Session, components: Sequence[Component], advance: Callable[[], None] = lambda: None) -> Walk:
    """Draws every prompt of the session once, and returns what it takes to draw it again.

    `advance` is called after each. Raises TurbopocketError for a walk of more than `MOST_CALLS` calls.
    """
    manifest = session.manifest
    require_short(manifest)
    rows = manifest.sampler_table.rows if manifest.sampler_table else []
    drawn = []
    for index in range(len(session.prompts)):
        recorder = Recorder(torch_runner(components))
        session.draw(recorder, index)
        drawn.append(recorder.calls)
        advance()
    denoiser = manifest.pipeline.denoiser.component
    calls = [[call.inputs for call in each if call.component == denoiser] for each in drawn]
    halves = len(calls[0]) // len(rows)
    asked = [
        [_batched([each[step * halves + half] for each in calls]) for half in range(halves)]
        for step in range(len(rows))
    ]
    ids = {name: _batched([_first(each, name) for each in drawn]) for name in manifest.pipeline.text_encoders}
    by_name = {component.name: component for component in components}
    return Walk(by_name, manifest, ids, asked, _noise(session))


def _noise(session: Session) -> list[Tensor]:
    """All that the sampler asks for, as the loop draws it from each picture's own seed."""
    manifest = session.manifest
    image, table = manifest.image, manifest.sampler_table
    assert table is not None
    shape = 1, image.latent_channels, image.latent_height, image.latent_width
    fresh = sum("noise" in row.steps[min(n, len(row.steps) - 1)].next for n, row in enumerate(table.rows))
    sources = [seeded_noise(session.seed + index) for index in range(len(session.prompts))]
    return [torch.from_numpy(np.concatenate([source(shape) for source in sources])) for _ in range(1 + fresh)]


def _sum(of: Sum, values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([number * values[name] for name, number in of.items()]).sum(0)


def _first(calls: Sequence[Call], component: str) -> Arrays:
    return next(call.inputs for call in calls if call.component == component)


def _batched(rows: Sequence[Arrays]) -> Arrays:
    """One batch of all; a number that is the same for a whole batch stays one."""
    return {
        name: np.concatenate([row[name] for row in rows]) if rows[0][name].ndim else rows[0][name] for name in rows[0]
    }


def rows_of(arrays: Arrays, rows: slice) -> dict[str, Tensor]:
    """Where PyTorch puts tensors, in whatever process: of inputs that begin elsewhere, products have other last digits.

    A number for all rows stays one.
    """
    return {name: torch.from_numpy(each[rows] if each.ndim else each).clone() for name, each in arrays.items()}
