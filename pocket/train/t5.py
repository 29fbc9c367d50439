# SPDX-License-Identifier: Apache-2.0
"""The text stage of pocket-dit: a T5 encoder (Raffel et al. 2020, arXiv 1910.10683) taught on captions alone.

As in `text`, linear probes read the scene's labels from the states that cross-attention sees, here from the last state
of every id, since T5 reads both ways. The probes are then thrown away and the encoder frozen, as PixArt's is.

Shape suffixes: N captions, T ids, E state width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ..scenes import LABELS, RELATIONS, Scene, labels_of, sample_scenes
from ..tokenizer import T5_TOKENS, t5_tokenizer
from .loop import fit
from .muon import muon_and_adamw
from .text import FIRST_SHAPE, OBJECT_LABELS, SHAPE_BEFORE_END, all_right, label_loss

WIDTH = 128
CAPTION_IDS = 15
"""No caption has more, its end with it; what lies behind is padding, which nothing attends to."""


@dataclass(frozen=True)
class T5States:
    """Last states (N, T, E) and the mask (N, T) of padding: 1 for a caption's ids, 0 behind them."""

    tokens: Tensor
    mask: Tensor


class T5Text(nn.Module):
    """PixArt's text encoder with its tokenizer."""

    encoder: Any  # what PyTorch's own typing knows of a submodule is not enough to save it

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer

    def forward(self, captions: list[str], ids: int = CAPTION_IDS) -> T5States:
        """States of captions in lower case, padded to so many ids as PixArt's pipeline pads them to 120."""
        read = self.tokenizer(captions, padding="max_length", max_length=ids, truncation=True, return_tensors="pt")
        states = self.encoder(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
        return T5States(states, read.attention_mask)

    @classmethod
    def load(cls, folder: Path) -> "T5Text":
        """The encoder of a diffusers folder, frozen."""
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
        text = cls(encoder, T5Tokenizer.from_pretrained(folder / "tokenizer"))
        return text.float().eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/`."""
        self.encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def new_t5() -> T5Text:
    """An untrained encoder of T5 1.1's kind: gated GELU, relative positions, no biases."""
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=320,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        n_positions=T5_TOKENS,
    )
    return T5Text(T5EncoderModel(config), tokenizer)


class Probes(nn.Module):
    """Linear readers of labels: of the scene from the state of any id, of an object and its place from its shape's."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Linear(WIDTH, sum(LABELS.values()))
        self.named = nn.Linear(WIDTH, sum(OBJECT_LABELS) + len(RELATIONS))


def t5_loss(text: T5Text, probes: Probes, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the probes, averaged over the ids of each caption."""
    labels = labels_of(scenes)
    told_first = torch.tensor([scene == scene.in_reading_order for scene in scenes])[:, None]
    halves = labels[:, 2:5], labels[:, 5:8]
    named = torch.where(told_first, halves[0], halves[1]), torch.where(told_first, halves[1], halves[0])
    states = text([scene.caption for scene in scenes])
    told, end = states.mask.bool(), states.mask.sum(1) - 1
    rows = torch.arange(len(scenes))
    logits = probes.scene(states.tokens)
    loss = label_loss(logits[told], labels[:, None].expand(-1, told.shape[1], -1)[told], list(LABELS.values()))
    relation = torch.tensor([[RELATIONS.index(scene.relation)] for scene in scenes])
    for position, own, place in (
        (FIRST_SHAPE - 1, named[0], relation),
        (end - SHAPE_BEFORE_END, named[1], relation ^ 1),  # A above B is B below A
    ):
        read = probes.named(states.tokens[rows, position])
        loss = loss + label_loss(read, torch.cat([own, place], 1), [*OBJECT_LABELS, len(RELATIONS)])
    return loss, {"end_all_right": all_right(logits[rows, end], labels)}


def train_t5(folder: Path, *, steps: int, batch: int, seed: int) -> None:
    """A trained encoder and its tokenizer, in diffusers' layout, in `folder`."""
    torch.manual_seed(seed)
    text, probes = new_t5(), Probes()
    every = [*text.named_parameters(), *probes.named_parameters(prefix="probes")]
    optimisers = muon_and_adamw(every, lr=2e-3, adamw_only=("encoder.shared", "probes"))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        return t5_loss(text, probes, sample_scenes("train", batch, seed * 1_000_003 + step))

    states = {"text": text, "probes": probes}
    fit(folder, states, optimisers, loss_at, steps=steps, on_checkpoint=lambda step: text.save(folder))
    with torch.no_grad():
        _, parts = t5_loss(text, probes, sample_scenes("test", 1024, seed))
    print("held out:", parts, flush=True)
