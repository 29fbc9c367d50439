# SPDX-License-Identifier: Apache-2.0
"""Which prompts a model is calibrated and compared on: the folder says so, wherever it lies."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.bundled import BUNDLED
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.evidence import EVIDENCE_FILE, SceneEvidence, TextEvidence, evidence_for
from turbopocket.ground.errors import TurbopocketError
from turbopocket.pocket.scenes import parse_caption


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The bundled student under another name, as `distill` and people make them."""
    folder = tmp_path / "my-turbo"
    shutil.copytree(BUNDLED["pocket-turbo"], folder)
    return folder


def test_a_model_of_scenes_is_shown_scenes_wherever_it_lies(copy: Path) -> None:
    """Once `build build/my-turbo` was calibrated on a photo of an old fisherman."""
    evidence = evidence_for(load_shapes(str(copy)))
    assert isinstance(evidence, SceneEvidence)
    for prompt in evidence.prompts("calibrate", 3, seed=0):
        parse_caption(prompt)


def test_other_models_are_shown_everyday_things(copy: Path, tiny_sd: Path) -> None:
    assert isinstance(evidence_for(load_shapes(str(tiny_sd))), TextEvidence)
    (copy / EVIDENCE_FILE).write_text('{"prompts": "everyday"}')
    assert isinstance(evidence_for(load_shapes(str(copy))), TextEvidence)


@pytest.mark.parametrize(
    "content", [{"prompts": "cats"}, {"prompts": ["scenes"]}, {}, {"prompts": "scenes", "judge": 1}]
)
def test_a_file_that_says_something_else_is_refused(copy: Path, content: dict[str, Any]) -> None:
    (copy / EVIDENCE_FILE).write_text(json.dumps(content))
    with pytest.raises(TurbopocketError, match="allowed is .*one of scenes, everyday"):
        evidence_for(load_shapes(str(copy)))


@pytest.mark.parametrize("content", [b"[", b"5", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_refused(copy: Path, content: bytes) -> None:
    (copy / EVIDENCE_FILE).write_bytes(content)
    with pytest.raises(TurbopocketError, match="evidence.json"):
        evidence_for(load_shapes(str(copy)))
