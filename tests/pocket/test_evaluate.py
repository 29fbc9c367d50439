# SPDX-License-Identifier: Apache-2.0
"""The evaluation: distance, noise, and the loop around any picture source."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from turbopocket.pocket.evaluate import evaluate, first_noise, frechet_distance
from turbopocket.pocket.judge import FEATURE_WIDTH, JUDGE_FILE, Judge, load_judge
from turbopocket.pocket.render import render
from turbopocket.pocket.scenes import parse_caption


@pytest.fixture(scope="module")
def judge() -> Judge:
    if not JUDGE_FILE.exists():
        pytest.skip(f"{JUDGE_FILE.name} is not there; `make train-pocket` trains it")
    return load_judge()


def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
    """A perfect model: draws each prompt by program."""
    pictures = render([parse_caption(prompt) for prompt in prompts], torch.Generator().manual_seed(seeds[0]))
    return np.round(pictures.movedim(1, -1).numpy() * 255).astype(np.uint8)


def mirrored(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
    """A model that mixes up left and right, above and below."""
    return np.ascontiguousarray(drawn(prompts, seeds)[:, ::-1, ::-1])


def test_a_perfect_model_scores_one_and_reaches_the_floor(judge: Judge) -> None:
    result = evaluate(drawn, judge, split="test", prompts=200, seed=0)
    assert result.alignment >= 0.98
    assert result.frechet == pytest.approx(result.frechet_floor, rel=0.3)


def test_a_model_that_mixes_up_sides_scores_near_zero(judge: Judge) -> None:
    result = evaluate(mirrored, judge, split="test", prompts=200, seed=0)
    assert result.alignment <= 0.1
    assert result.by_label["background"] >= 0.98
    assert result.frechet > 2 * result.frechet_floor


class GaussianReader(Judge):
    """Reads a picture's first two pixels as its features."""

    def features(self, pictures_NCHW: torch.Tensor) -> torch.Tensor:
        return pictures_NCHW[:, :, 0, 0].repeat(1, FEATURE_WIDTH)[:, :FEATURE_WIDTH]


def test_frechet_distance_is_the_closed_form_of_heusel_equation_6() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(4000, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64) for _ in range(2))
    second = 0.5 * second + 0.25  # half the spread around the same middle
    distance = frechet_distance(GaussianReader(), first, second)
    per_feature = (12**-0.5 - 0.5 * 12**-0.5) ** 2
    assert distance == pytest.approx(FEATURE_WIDTH * per_feature, rel=0.05)
    assert frechet_distance(GaussianReader(), first, first) == pytest.approx(0.0, abs=1e-3)


def test_first_noise_depends_on_each_seed_alone() -> None:
    together, alone = first_noise([3, 4]), first_noise([4])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (2, 4, 8, 8)
    assert together.dtype == torch.float32
