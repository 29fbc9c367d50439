# SPDX-License-Identifier: Apache-2.0
"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683) as a graph: ids and a mask to the last hidden state."""

from typing import Any

import torch
from torch import Tensor, nn

from .graphs import EXAMPLE_BATCH, Component, ComponentModule

MASKED = -30_000.0
"""Added to the scores of padding. exp of it is 0 after any other score, and it is a number in fp16 too."""


class _Encoder(nn.Module):
    """The stack of a T5EncoderModel, with the module paths it has in the whole.

    `shared`, the embedding's other name, is left out: it is one table, which is stored once.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.tokens = tokens
        attention = self.encoder.block[0].layer[0].SelfAttention
        self.buckets = attention.relative_attention_num_buckets
        self.farther = bucket_bounds(attention, tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder.embed_tokens(input_ids)
        bias = torch.where(attention_mask[:, None, None, :] > 0, self.position_bias(input_ids.device), MASKED)
        for block in self.encoder.block:
            attention, feed_forward = block.layer
            states = attention(states, position_bias=bias)[0]
            states = states + gated(feed_forward.DenseReluDense, feed_forward.layer_norm(states))
        last: Tensor = self.encoder.final_layer_norm(states)
        return last

    def position_bias(self, device: torch.device) -> Tensor:
        """What is added to the scores of two positions for their distance alone, [1, heads, T, T].

        transformers finds buckets by a logarithm, where one last digit moves a distance to the next bucket; whole
        numbers are compared here, so that every runtime finds the same.
        """
        distances = torch.arange(1 - self.tokens, self.tokens, device=device)
        buckets = (distances > 0).long() * (self.buckets // 2)
        for bound in self.farther:
            buckets = buckets + (distances.abs() >= bound).long()
        by_distance = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        positions = torch.arange(self.tokens, device=device)
        pairs = by_distance[positions[None, :] - positions[:, None] + (self.tokens - 1)]
        return pairs.permute(2, 0, 1)[None]


def gated(layers: Any, x: Tensor) -> Tensor:
    """wo(act(wi_0 x) * wi_1 x). transformers' own asks for the weight of wo, which a target's layer need not have."""
    y: Tensor = layers.wo(layers.act(layers.wi_0(x)) * layers.wi_1(x))
    return y


def bucket_bounds(attention: Any, tokens: int) -> list[int]:
    """Returns the distances below `tokens`, ascending, from which a pair falls into the next bucket of its side."""
    buckets = attention._relative_position_bucket(
        -torch.arange(tokens, device="cpu"),
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    ).tolist()
    return [far for far in range(1, tokens) for _ in range(buckets[far] - buckets[far - 1])]


class _T5(ComponentModule):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        torch._check(attention_mask.shape[0] == input_ids.shape[0])  # one batch size, so that tracing finds one symbol
        last: Tensor = self.model(input_ids, attention_mask)
        return last


def t5_encoder_component(model: nn.Module, name: str, tokens: int) -> Component:
    """`input_ids` [B, T] and `attention_mask` [B, T] (1 for a prompt's ids, 0 for padding), both int64, to
    `last_hidden_state` [B, T, D]; T is `tokens`. What stands at padding has no meaning.
    """
    ids = torch.zeros(EXAMPLE_BATCH, tokens, dtype=torch.int64)
    return Component(
        name=name,
        module=_T5(name, _Encoder(model, tokens)),
        example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        output_names=("last_hidden_state",),
        role="text encoder",
    )
