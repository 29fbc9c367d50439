# SPDX-License-Identifier: Apache-2.0
"""The first layers of a Qwen3 (Yang et al. 2025, arXiv 2505.09388) as a graph: ids and a mask to states in between."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .graphs import EXAMPLE_BATCH, Component, ComponentModule
from .t5 import MASKED


class _Layers(nn.Module):
    """The embedding and the first layers of a Qwen3Model."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.embed_tokens = model.embed_tokens
        self.layers = nn.ModuleList(model.layers[:count])
        self.rotary_emb = model.rotary_emb


class _FirstLayers(nn.Module):
    """What of a Qwen3ForCausalLM gives the states after the layers `read`, with the module paths it has in the whole.

    Layers behind these, the last norm and the head, which may be the embedding's other name, are left out.
    """

    def __init__(self, model: Any, read: Sequence[int]) -> None:
        super().__init__()
        self.model = _Layers(model.model, max(read))
        self.read = frozenset(read)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        before = positions[None, :] <= positions[:, None]
        seen = before[None, None] & (attention_mask[:, None, None, :] > 0)
        states, mask = self.model.embed_tokens(input_ids), torch.where(seen, 0.0, MASKED)
        rotary = self.model.rotary_emb(states, positions[None])
        found = []
        for count, layer in enumerate(self.model.layers, start=1):
            states = layer(states, attention_mask=mask, position_embeddings=rotary)
            if count in self.read:
                found.append(states)
        return tuple(found)


class _Qwen3(ComponentModule):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        torch._check(attention_mask.shape[0] == input_ids.shape[0])  # one batch size, so that tracing finds one symbol
        states: tuple[Tensor, ...] = self.model(input_ids, attention_mask)
        return states


def qwen3_component(model: nn.Module, name: str, tokens: int, read: Sequence[int]) -> Component:
    """`input_ids` [B, T] and `attention_mask` [B, T] (1 for a prompt's ids, 0 for padding), both int64, to
    `hidden_states.K` [B, T, D] for each K of `read`, ascending: the states after so many layers. T is `tokens`.
    """
    ids = torch.zeros(EXAMPLE_BATCH, tokens, dtype=torch.int64)
    return Component(
        name=name,
        module=_Qwen3(name, _FirstLayers(model, read)),
        example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        output_names=tuple(f"hidden_states.{count}" for count in sorted(read)),
        role="text encoder",
    )
