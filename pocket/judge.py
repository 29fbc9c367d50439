# SPDX-License-Identifier: Apache-2.0
"""The judge: reads a picture back into scene labels, and so measures prompt alignment exactly.

Shape suffixes: N pictures, H rows, W columns, C channels, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from .render import SIDE
from .scenes import LABELS, Scene, labels_of

JUDGE_FILE = Path(__file__).parent / "weights" / "judge" / "judge.safetensors"
COUNTS = (1, 2, 3)  # objects in a picture; all but 2 are faults
HEADS = {**LABELS, "count": len(COUNTS)}
WORDS = {
    "axis": "how the two lie to each other",
    "background": "the background",
    **{
        f"{what}{index}": f"the {what} of the {which} one"
        for index, which in enumerate(("left or upper", "right or lower"))
        for what in ("shape", "colour", "size")
    },
    "count": "how many there are",
}
"""What a person calls each attribute."""
FEATURE_WIDTH = 128
BATCH = 256

Pictures = Tensor | NDArray[np.uint8] | NDArray[np.float32]


class Judge(nn.Module):
    """A small convolutional reader of 64x64 pictures: features, and from them one logit group per head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 40), (40, 64)):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 32, 1)]
        flat = 32 * (SIDE // 8) ** 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.SiLU(), nn.Linear(flat, FEATURE_WIDTH))
        self.heads = nn.Linear(FEATURE_WIDTH, sum(HEADS.values()))

    def features(self, pictures_NCHW: Tensor) -> Tensor:
        """(N, F) features of float pictures in [0, 1]."""
        features: Tensor = self.trunk(2 * pictures_NCHW - 1)
        return features

    def forward(self, pictures_NCHW: Tensor) -> list[Tensor]:
        """One (N, classes) logit tensor per head, in the order of `HEADS`."""
        logits: Tensor = self.heads(nn.functional.silu(self.features(pictures_NCHW)))
        return list(logits.split(list(HEADS.values()), -1))


@dataclass(frozen=True)
class Alignment:
    """How well pictures show their scenes; every value is a share of the pictures, 0 to 1.

    Attributes:
        all_right: shares with exactly two objects and every label right; "alignment" in reports.
        by_label: per label (`scenes.LABELS`), and "count" for pictures with exactly two objects.
        correct: which pictures are all right.
    """

    all_right: float
    by_label: dict[str, float]
    correct: NDArray[np.bool_]


def load_judge(file: Path = JUDGE_FILE) -> Judge:
    """The trained judge, frozen, in float32."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return judge.eval().requires_grad_(False)


def reads(picture: NDArray[np.uint8]) -> bool:
    """Whether a picture [H, W, C] is of the size that the judge was trained on."""
    return picture.shape == (SIDE, SIDE, 3)


def as_pictures(pictures: Pictures) -> Tensor:
    """(N, 3, 64, 64) float32 in [0, 1].

    Args:
        pictures: uint8, or float in [0, 1]; a tensor is (N, 3, H, W), an array (N, H, W, 3).

    Raises:
        ValueError: not 64x64 with three channels, or floats outside [0, 1].
    """
    tensor = (
        torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, 1)
        if isinstance(pictures, np.ndarray)
        else pictures
    )
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}, the judge reads {SIDE}x{SIDE} with 3 channels")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"float pictures span {low:.3g} to {high:.3g}, allowed is 0 to 1")
    return tensor.float()


@torch.no_grad()
def read_labels(judge: Judge, pictures: Pictures) -> Tensor:
    """(N, 9) int64 labels the judge reads, columns as `HEADS`."""
    batches = as_pictures(pictures).split(BATCH)
    return torch.cat([torch.stack([logits.argmax(-1) for logits in judge(batch)], 1) for batch in batches])


@torch.no_grad()
def features(judge: Judge, pictures: Pictures) -> Tensor:
    """(N, 128) features, for distances between sets of pictures."""
    return torch.cat([judge.features(batch) for batch in as_pictures(pictures).split(BATCH)])


def alignment(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> Alignment:
    """How well each picture shows its scene.

    Raises:
        ValueError: not one scene per picture.
    """
    if len(pictures) != len(scenes):
        raise ValueError(f"{len(pictures)} pictures for {len(scenes)} scenes; alignment needs one each")
    right = _right(judge, pictures, scenes)
    by_label = dict(zip(HEADS, right.float().mean(0).tolist(), strict=True))
    correct = right.all(1).numpy()
    return Alignment(float(correct.mean()), by_label, correct)


def misread(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> list[list[str]]:
    """For each picture, in words, the attributes of its scene that the judge reads otherwise."""
    right = _right(judge, pictures, scenes).tolist()
    return [[WORDS[head] for head, shown in zip(HEADS, row, strict=True) if not shown] for row in right]


def _right(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> torch.Tensor:
    """Whether each attribute of each picture is read as its scene has it: bool [N, heads]."""
    two = torch.full((len(scenes), 1), COUNTS.index(2))
    return read_labels(judge, pictures) == torch.cat([labels_of(scenes), two], 1)
