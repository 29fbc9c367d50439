# SPDX-License-Identifier: Apache-2.0
"""The text stage: two CLIP text encoders whose states tell the scene, taught on captions alone.

Linear probes read the scene's labels from the pooled output and from the penultimate states that SDXL's
cross-attention sees; training the probes together with the encoders makes those states contextual. The
probes are then thrown away and the encoders frozen.

Shape suffixes: N captions, T tokens, E state width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..scenes import LABELS, Scene, labels_of, sample_scenes
from ..tokenizer import END, MAX_TOKENS, write_tokenizer
from .loop import fit

WIDTHS = (64, 96)
POOLED_WIDTH = 128
# Real CLIP's start token carries states tens of times larger than any other token's (peak 823 against 10 to 15
# in OpenAI ViT-L/14). Nothing here would grow that in minutes, so it is planted in the position embedding:
# channel and value, per encoder.
START_OUTLIERS = (((7, 900.0), (40, -150.0)), ((11, 900.0), (58, -200.0)))
CAPTION_TOKENS = 20  # no caption is longer; most steps skip the padding behind it
FIRST_SHAPE = 4  # position of the first object's shape word
SHAPE_BEFORE_END = 5  # distance from the second object's shape word to the end token
OBJECT_LABELS = [size for name, size in LABELS.items() if name.endswith("0")]


@dataclass(frozen=True)
class TextStates:
    """What SDXL hands its UNet: penultimate states (N, 77, 160) and the pooled output (N, 128)."""

    tokens: Tensor
    pooled: Tensor


class TextEncoders(nn.Module):
    """SDXL's two text encoders with their tokenizers."""

    first: Any  # what PyTorch's own typing knows of a submodule is not enough to save it
    second: Any

    def __init__(self, first: nn.Module, second: nn.Module, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.first, self.second, self.tokenizers = first, second, tokenizers

    def token_ids(self, captions: list[str]) -> list[Tensor]:
        """(N, 77) ids per tokenizer, padded as SDXL pads them."""
        options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        return [tokenizer(captions, **options).input_ids for tokenizer in self.tokenizers]

    def forward(self, ids: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Penultimate states per encoder and the second encoder's pooled output."""
        first = self.first(ids[0], output_hidden_states=True)
        second = self.second(ids[1], output_hidden_states=True)
        return [first.hidden_states[-2], second.hidden_states[-2]], second.text_embeds

    @torch.no_grad()
    def states(self, captions: list[str]) -> TextStates:
        """The conditioning of the captions, as `StableDiffusionXLPipeline.encode_prompt` computes it."""
        penultimate, pooled = self(self.token_ids(captions))
        return TextStates(torch.cat(penultimate, -1), pooled)

    @classmethod
    def load(cls, folder: Path) -> "TextEncoders":
        """The encoders of a diffusers folder, frozen."""
        encoders = cls(
            CLIPTextModel.from_pretrained(folder / "text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
            (
                CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            ),
        )
        return encoders.float().eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `text_encoder/`, `text_encoder_2/`, `tokenizer/` and `tokenizer_2/`."""
        self.first.save_pretrained(folder / "text_encoder")
        self.second.save_pretrained(folder / "text_encoder_2")
        self.save_tokenizers(folder)

    def save_tokenizers(self, folder: Path) -> None:
        """Write `tokenizer/` and `tokenizer_2/` with every file that some reader of SDXL folders wants."""
        write_tokenizer(folder / "tokenizer", END)
        write_tokenizer(folder / "tokenizer_2", "!")


def new_encoders(folder: Path) -> TextEncoders:
    """Untrained encoders, tokenizers written to `folder`, start-token outliers planted."""
    write_tokenizer(folder / "tokenizer", END)
    write_tokenizer(folder / "tokenizer_2", "!")
    tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    configs = [
        CLIPTextConfig(
            vocab_size=len(tokenizers[i]),
            hidden_size=WIDTHS[i],
            intermediate_size=4 * WIDTHS[i],
            num_hidden_layers=3,
            num_attention_heads=(2, 3)[i],
            projection_dim=POOLED_WIDTH,
            max_position_embeddings=MAX_TOKENS,
            hidden_act=("quick_gelu", "gelu")[i],
            bos_token_id=tokenizers[i].bos_token_id,
            eos_token_id=tokenizers[i].eos_token_id,
            pad_token_id=tokenizers[i].pad_token_id,
        )
        for i in range(2)
    ]
    encoders = TextEncoders(CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1]), tokenizers)
    with torch.no_grad():
        for encoder, outliers in zip((encoders.first, encoders.second), START_OUTLIERS, strict=True):
            positions = encoder.get_submodule(_positions(encoder)).weight
            for channel, value in outliers:
                positions[0, channel] = value
    return encoders


def _positions(encoder: nn.Module) -> str:
    return next(name for name, _ in encoder.named_modules() if name.endswith("position_embedding"))


class Probes(nn.Module):
    """Linear readers of the labels: from pooled outputs, and from single penultimate token states."""

    def __init__(self) -> None:
        super().__init__()
        everything = sum(LABELS.values())
        self.pooled = nn.Linear(POOLED_WIDTH, everything)
        self.scene = nn.ModuleList(nn.Linear(width, everything) for width in WIDTHS)
        self.named = nn.ModuleList(nn.Linear(width, sum(OBJECT_LABELS)) for width in WIDTHS)


def label_loss(logits: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
    """Mean cross-entropy over the label columns; logits (..., sum of sizes), labels (..., columns)."""
    parts = logits.split(sizes, -1)
    columns = labels.unbind(-1)
    losses = [cross_entropy(p.flatten(0, -2), c.flatten()) for p, c in zip(parts, columns, strict=True)]
    return torch.stack(losses).mean()


def all_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose every label column is the arg max of its logits."""
    guesses = torch.stack([part.argmax(-1) for part in logits.split(list(LABELS.values()), -1)], -1)
    return float((guesses == labels).all(-1).float().mean())


def text_loss(
    encoders: TextEncoders, probes: Probes, scenes: list[Scene], tokens: int
) -> tuple[Tensor, dict[str, float]]:
    """Probe loss on the first `tokens` positions; each state is asked only what stands before it."""
    labels = labels_of(scenes)
    told_first = torch.tensor([scene == scene.in_reading_order for scene in scenes])[:, None]
    halves = labels[:, 2:5], labels[:, 5:8]
    named = torch.where(told_first, halves[0], halves[1]), torch.where(told_first, halves[1], halves[0])
    ids = [each[:, :tokens] for each in encoders.token_ids([scene.caption for scene in scenes])]
    end = ids[0].eq(encoders.tokenizers[0].eos_token_id).int().argmax(1)
    penultimate, pooled = encoders(ids)
    rows, sizes = torch.arange(len(scenes)), list(LABELS.values())
    logits = probes.pooled(pooled)
    loss = 2 * label_loss(logits, labels, sizes)
    told = torch.arange(tokens) >= end[:, None]  # the end token and the padding behind it have read it all
    for i, states in enumerate(penultimate):
        second_shape = states[rows, end - SHAPE_BEFORE_END]
        scene_at_end = probes.scene[i](states[told])
        loss = loss + label_loss(scene_at_end, labels[:, None].expand(-1, tokens, -1)[told], sizes)
        loss = loss + label_loss(probes.named[i](states[:, FIRST_SHAPE]), named[0], OBJECT_LABELS)
        loss = loss + label_loss(probes.named[i](second_shape), named[1], OBJECT_LABELS)
        before_background = probes.scene[i](second_shape)
        parts = [before_background[:, :2], before_background[:, 6:]]
        columns = torch.cat([labels[:, :1], labels[:, 2:]], 1)
        loss = loss + label_loss(torch.cat(parts, 1), columns, [sizes[0], *sizes[2:]])
    return loss, {"pooled_all_right": all_right(logits, labels)}


def train_text(folder: Path, *, steps: int, batch: int, seed: int) -> None:
    """Trained encoders and tokenizers, in diffusers' layout, in `folder`."""
    torch.manual_seed(seed)
    encoders, probes = new_encoders(folder), Probes()
    parameters = [*encoders.parameters(), *probes.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = sample_scenes("train", batch, seed * 1_000_003 + step)
        return text_loss(encoders, probes, scenes, MAX_TOKENS if step % 4 == 0 else CAPTION_TOKENS)

    states = {"encoders": encoders, "probes": probes}
    fit(folder, states, {"adamw": optimiser}, loss_at, steps=steps, on_checkpoint=lambda step: encoders.save(folder))
    with torch.no_grad():
        _, parts = text_loss(encoders, probes, sample_scenes("test", 1024, seed), MAX_TOKENS)
    print("held out:", parts, "start-token ratio:", start_ratio(encoders, seed), flush=True)


def start_ratio(encoders: TextEncoders, seed: int) -> dict[str, float]:
    """Greatest |state| at the start token over the greatest at any other, on 64 test captions.

    Per encoder, and for the two side by side as the UNet sees them.
    """
    captions = [scene.caption for scene in sample_scenes("test", 64, seed)]
    with torch.no_grad():
        first, second = encoders(encoders.token_ids(captions))[0]
    each = {"text_encoder": first, "text_encoder_2": second, "both": torch.cat([first, second], -1)}
    return {name: float(h[:, 0].abs().max() / h[:, 1:].abs().max()) for name, h in each.items()}
