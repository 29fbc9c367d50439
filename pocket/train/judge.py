# SPDX-License-Identifier: Apache-2.0
"""The judge stage: drawn scenes of one, two and three objects, blurred and noised, read back."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, pad

from ..judge import COUNTS, Judge, alignment
from ..render import BACKGROUND_RGB, COLOUR_RGB, draw, place, render
from ..scenes import LABELS, labels_of, sample_scenes
from .loop import fit, step_generator

BLUR_SIGMA = 0.8  # greatest, pixels
NOISE = 0.06  # greatest standard deviation
CONTRAST = 0.08  # greatest change of gain and offset
NO_OBJECT = float("nan")


def train_judge(folder: Path, *, steps: int, batch: int, seed: int) -> None:
    """A trained judge in `folder/judge.safetensors`, half precision."""
    torch.manual_seed(seed)
    judge = Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(seed, step)
        pictures, labels = practice(batch, seed * 1_000_003 + step, generator)
        return reading_loss(judge, disturb(pictures, generator), labels)

    def save(step: int) -> None:
        save_file({name: value.half() for name, value in judge.state_dict().items()}, folder / "judge.safetensors")

    fit(folder, {"judge": judge}, {"adamw": optimiser}, loss_at, steps=steps, on_checkpoint=save)
    print("held out:", held_out_accuracy(judge, 4096, seed), flush=True)


def practice(batch: int, scene_seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` pictures and (batch, 9) labels, -100 where a broken picture has no answer.

    Three quarters are scenes; an eighth lacks one object, an eighth has a third, with only background and
    count to read.
    """
    labels = labels_of(sample_scenes("train", batch, scene_seed))
    lone, crowded = batch // 8, batch // 8
    counts = torch.full((batch, 1), COUNTS.index(2))
    counts[:lone], counts[lone : lone + crowded] = COUNTS.index(1), COUNTS.index(3)
    pictures = torch.cat(
        [
            _draw_objects(labels[:lone], 2, generator, missing=True),
            _draw_objects(labels[lone : lone + crowded], 3, generator),
            _draw_objects(labels[lone + crowded :], 2, generator),
        ]
    )
    labels[: lone + crowded, [i for i, name in enumerate(LABELS) if name != "background"]] = -100
    return pictures, torch.cat([labels, counts], 1)


def _draw_objects(labels: Tensor, objects: int, generator: torch.Generator, missing: bool = False) -> Tensor:
    count = len(labels)
    columns = dict(zip(LABELS, labels.unbind(1), strict=True))

    def column(name: str) -> Tensor:
        extra = torch.randint(LABELS[f"{name}0"], (count, objects - 2), generator=generator)
        return torch.cat([columns[f"{name}0"][:, None], columns[f"{name}1"][:, None], extra], 1)

    radii, centres = place(column("size"), columns["axis"], generator)
    if missing:
        radii[torch.arange(count), torch.randint(objects, (count,), generator=generator)] = NO_OBJECT
    background = BACKGROUND_RGB[columns["background"]]
    return draw(column("shape"), radii, centres, COLOUR_RGB[column("colour")], background)


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures under mild blur, change of contrast and tint, and noise, as a decoder might leave them."""
    count = len(pictures)

    def spread(greatest: float, *shape: int) -> Tensor:
        return greatest * (2 * torch.rand(count, *shape, generator=generator) - 1)

    blurred = blur(pictures, float(torch.rand((), generator=generator)) * BLUR_SIGMA + 0.05)
    pictures = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, blurred, pictures)
    pictures = pictures * (1 + spread(CONTRAST, 3, 1, 1)) + spread(CONTRAST, 3, 1, 1)
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + spread(NOISE, 1, 1, 1) * noise).clamp(0, 1)


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation `sigma` pixels, edges repeated."""
    offsets = torch.arange(-3, 4).float()
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    square = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return conv2d(pad(pictures, (3, 3, 3, 3), "replicate"), square.expand(3, 1, 7, 7), groups=3)


def reading_loss(judge: Judge, pictures: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the heads; the log line is the share of answers that are right."""
    logits = judge(pictures)
    losses = [cross_entropy(part, column) for part, column in zip(logits, labels.unbind(1), strict=True)]
    guesses = torch.stack([part.argmax(-1) for part in logits], 1)
    asked = labels >= 0
    return torch.stack(losses).mean(), {"right": float((guesses == labels)[asked].float().mean())}


def held_out_accuracy(judge: Judge, n: int, seed: int) -> dict[str, float]:
    """Share of test scenes read all right: clean, blurred and noised."""
    scenes, generator = sample_scenes("test", n, seed), step_generator(seed, 0)
    clean = render(scenes, generator)
    noised = (clean + 0.05 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    kinds = {"clean": clean, "blurred": blur(clean, 0.7), "noised": noised}
    return {kind: alignment(judge, pictures, scenes).all_right for kind, pictures in kinds.items()}
