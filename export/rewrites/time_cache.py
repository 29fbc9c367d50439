# SPDX-License-Identifier: Apache-2.0
"""What a UNet makes of the timestep alone, as a table of the timesteps that a schedule walks through.

The cache of Huang et al., Temporal Feature Matters (2024), arXiv 2407.19547: a walk has few timesteps, so what depends
on nothing else is known. In SDXL that is h(t), the output of `time_embedding`, to which an embedding of the prompt is
added; without such an addition (Stable Diffusion 1.x) also what every `time_emb_proj` makes of h(t), so that the whole
temporal block is gone. B batch, T timesteps, E width of a row.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtimes.compare.replay import Call
from ...runtimes.pipeline import Pipeline
from ..families.graphs import Component, UNetModule
from .base import Rewrite, Rewritten, own_modules


class Timestep(nn.Module):
    """In the place of the sinusoid: the timestep itself, [B] to [B, 1]."""

    def forward(self, timesteps_B: Tensor) -> Tensor:
        return timesteps_B[:, None]


class Unchanged(nn.Module):
    """In the place of `time_embedding`, where the timestep goes on to tables."""

    def forward(self, timestep_B1: Tensor, condition: Tensor | None = None) -> Tensor:
        return timestep_B1


class TimeTable(nn.Module):
    """In the place of layers: the row [B, E] of the key that is nearest to what is given, [B, 1]."""

    def __init__(self, keys_T: Tensor, rows_TE: Tensor) -> None:
        super().__init__()
        self.keys, self.rows = (nn.Parameter(each, requires_grad=False) for each in (keys_T, rows_TE))

    def forward(self, x_B1: Tensor, condition: Tensor | None = None) -> Tensor:
        return functional.embedding((self.keys - x_B1).abs().argmin(dim=1), self.rows)


class TimeCache(Rewrite):
    """Tables for what depends on nothing but the timestep."""

    name: ClassVar[str] = "time-cache"
    of_text: ClassVar[bool] = False
    only_these_steps: ClassVar[bool] = True

    def refusal(self, denoiser: Component, pipeline: Pipeline) -> str | None:
        if not isinstance(denoiser.module, UNetModule):
            return f"{denoiser.name} is no UNet with a time embedding"
        unet = denoiser.module.model
        if unet.config.time_cond_proj_dim is not None:
            return f"{denoiser.name} makes its time embedding of the guidance, too"
        if unet.class_embedding is not None or unet.time_embed_act is not None:
            return f"{denoiser.name} makes more of its time embedding than projections"
        return None

    def shaped(self, denoiser: Component, pipeline: Pipeline, timesteps: Sequence[float]) -> Component:
        return self._with_tables(denoiser, torch.empty(len(timesteps), device="meta"))

    def made(
        self, denoiser: Component, pipeline: Pipeline, calls: Sequence[Call], timesteps: Sequence[float]
    ) -> Rewritten:
        known = list(dict.fromkeys(timesteps))
        with torch.no_grad():
            found = self._with_tables(denoiser, torch.tensor(known))
        before, after = (sum(each.numel() for each in own.module.parameters()) for own in (denoiser, found))
        facts = {"timesteps": float(len(known)), "numbers_before": float(before), "numbers_after": float(after)}
        remark = (
            f"{before - after:,} of {before:,} numbers of {denoiser.name} less: what it makes of "
            f"{', '.join(f'{each:g}' for each in known)} alone is in tables"
        )
        return Rewritten(found, facts, remark)

    def _with_tables(self, denoiser: Component, timesteps_T: Tensor) -> Component:
        """The denoiser with tables for these timesteps; of ones without values, tables without values."""
        rewritten = own_modules(denoiser)
        unet = rewritten.module.model
        projected = _with_projections(unet) if unet.config.addition_embed_type is None else []
        h_TE = _rows(unet.time_embedding, unet.time_embedding.linear_2, unet.time_proj(timesteps_T))
        unet.time_proj = Timestep()
        unet.time_embedding = Unchanged() if projected else TimeTable(timesteps_T, h_TE)
        for block in projected:
            projection = block.time_emb_proj
            rows_TE = _rows(projection, projection, _activated(block, h_TE))
            block.time_emb_proj = TimeTable(_activated(block, timesteps_T), rows_TE)
        return rewritten


def _with_projections(unet: nn.Module) -> list[Any]:
    """Blocks that project the time embedding."""
    return [module for module in unet.modules() if getattr(module, "time_emb_proj", None) is not None]


def _rows(layers: nn.Module, last: nn.Linear, x_TI: Tensor) -> Tensor:
    """What layers make of it; without values where it has none, whose width the last one knows."""
    if x_TI.is_meta:
        return x_TI.new_empty(len(x_TI), last.out_features)
    found: Tensor = layers(x_TI)
    return found


def _activated(block: Any, embedding: Tensor) -> Tensor:
    """What a block's projection is given; increasing, so that tables find a timestep by it."""
    activated: Tensor = embedding if block.skip_time_act else block.nonlinearity(embedding)
    return activated
