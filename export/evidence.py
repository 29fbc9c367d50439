# SPDX-License-Identifier: Apache-2.0
"""What a model is shown and how its pictures are judged: prompts for each use, never the same ones twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..ground.errors import TurbopocketError
from ..ground.reading import read_text
from .checkpoint.json_object import read_json_object

if TYPE_CHECKING:  # a file of prompts needs no PyTorch
    from ..runtimes.compare.replay import FeatureDistance
    from .families.base import LoadedModel

Use = Literal["calibrate", "measure", "report"]
SceneSplit = Literal["train", "selection", "test"]
EVIDENCE_FILE = "evidence.json"
USES: tuple[Use, ...] = ("calibrate", "measure", "report")
Picture = NDArray[np.uint8]


class Evidence(Protocol):
    """Prompts for a model, and what can be said about its pictures without a person."""

    def prompts(self, use: Use, count: int, seed: int) -> list[str]:
        """Returns `count` prompts; those of different uses are disjoint."""
        ...

    @property
    def feature_distance(self) -> "FeatureDistance | None":
        """How far apart a network finds two pictures; None when there is no network to ask."""
        ...

    def alignment(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> float | None:
        """Returns the share of pictures that show all their prompt says, None when nobody can tell."""
        ...

    def misread(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[list[str]]:
        """Returns for each picture what of its prompt it does not show, in words; nothing when nobody can tell."""
        ...


def evidence_for(model: "LoadedModel") -> Evidence:
    """Returns the evidence that the model's folder names in `evidence.json`, else everyday prompts and no judge.

    A student's folder has its teacher's file. Raises TurbopocketError when the file is damaged or names another one.
    """
    file = model.folder / EVIDENCE_FILE
    if not file.is_file():
        return TextEvidence()
    values = read_json_object(file)
    if set(values) != {"prompts"} or str(values["prompts"]) not in NAMED:
        raise TurbopocketError(
            f'{file} holds {json.dumps(values)[:200]}; allowed is {{"prompts": NAME}}, NAME one of {", ".join(NAMED)}',
            hint="delete the file: prompts of everyday things are used then",
        )
    return NAMED[values["prompts"]]()


class SceneEvidence:
    """The bundled model's own scenes: prompts split by combination, and a judge that reads pictures back."""

    _SPLITS: ClassVar[dict[Use, SceneSplit]] = {"calibrate": "train", "measure": "selection", "report": "test"}

    def __init__(self) -> None:
        from ..pocket.judge import load_judge

        self._judge = load_judge()

    def prompts(self, use: Use, count: int, seed: int) -> list[str]:
        """Returns captions of the split that belongs to `use`."""
        from ..pocket.scenes import captions

        return captions(self._SPLITS[use], count, seed)

    @property
    def feature_distance(self) -> "FeatureDistance":
        """||f(found) - f(expected)|| / ||f(expected)|| for the judge's features f, of pictures of its size."""
        return self._distance

    def alignment(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> float | None:
        """Returns the share of pictures in which the judge reads every attribute of the prompt.

        None when one of them is not of the size that the judge was trained on.
        """
        from ..pocket.judge import alignment, reads
        from ..pocket.scenes import parse_caption

        if not all(map(reads, pictures)):
            return None
        return alignment(self._judge, np.stack(pictures), [parse_caption(prompt) for prompt in prompts]).all_right

    def misread(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[list[str]]:
        """Returns for each picture the attributes that the judge reads otherwise; nothing where `alignment` is None."""
        from ..pocket.judge import misread, reads
        from ..pocket.scenes import parse_caption

        if not all(map(reads, pictures)):
            return []
        return misread(self._judge, np.stack(pictures), [parse_caption(prompt) for prompt in prompts])

    def _distance(self, found: Picture, expected: Picture) -> float | None:
        from ..pocket.judge import features, reads

        if not reads(expected):
            return None
        first, second = features(self._judge, np.stack([found, expected]))
        return float((first - second).norm() / second.norm())


class TextEvidence:
    """Thirty everyday prompts, a third for each use; pictures are left to the reader's eyes."""

    def prompts(self, use: Use, count: int, seed: int) -> list[str]:
        """Returns prompts of the use's own third, repeated when more are asked for."""
        text = (resources.files("turbopocket.export.recipes") / "prompts.txt").read_text(encoding="utf-8")
        own = text.splitlines()[USES.index(use) :: len(USES)]
        return [own[(seed + index) % len(own)] for index in range(count)]

    @property
    def feature_distance(self) -> None:
        """There is no network to ask."""
        return None

    def alignment(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> None:
        """Nobody can tell."""

    def misread(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[list[str]]:
        """Nobody can tell."""
        return []


NAMED: Mapping[str, Callable[[], Evidence]] = {"scenes": SceneEvidence, "everyday": TextEvidence}


def read_prompts(file: Path) -> list[str]:
    """Returns the prompts of a text file, one a line.

    Raises TurbopocketError for a file that is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        text = read_text(file)
    except TurbopocketError as error:
        raise TurbopocketError(f"prompt file {error}", error.hint) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise TurbopocketError(f"prompt file {file} holds no prompt; one a line is needed")
    return lines
