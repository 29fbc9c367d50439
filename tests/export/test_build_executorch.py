# SPDX-License-Identifier: Apache-2.0
"""A build for ExecuTorch with static steps, end to end: parity by layer, `check`, and what it needs beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.output.kept import RANGES_FILE
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.runtimes.drawing.text_to_image import generate, generate_batch
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.open import open_runner

pytest.importorskip("executorch")


@pytest.fixture(scope="module")
def built(tiny_sdxl: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    wanted = {
        "target": {"name": "executorch", "executorch": {"activations": "static"}},
        "compress": {"formats": ["int8-row"], "fit": "absmax"},
        "model": {"source": str(tiny_sdxl)},
    }
    out = tmp_path_factory.mktemp("executorch") / "art"
    recipe = make_recipe({**recipe_values, **wanted}, "test")
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


def test_the_plan_says_the_bytes(built: Built) -> None:
    assert built.total_bytes <= built.plan.total_bytes
    # 0.5 % on pocket-turbo; on so small a model graphs, which are counted at most, are half of the bytes
    assert built.total_bytes == pytest.approx(built.plan.total_bytes, rel=0.06)


def test_a_picture_is_drawn_from_the_programs(built: Built, turbopocket: Callable[..., Any], tmp_path: Path) -> None:
    ran = turbopocket("generate", built.folder, "a red ring", "-o", tmp_path / "out.png")
    assert ran.code == 0
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 0


def test_check_rounds_in_the_steps_that_calibration_chose(built: Built, turbopocket: Callable[..., Any]) -> None:
    assert turbopocket("check", built.folder).code == 0
    ranges = built.report.parent / RANGES_FILE
    kept = ranges.read_text()
    try:
        changed = json.loads(kept)
        layer = changed["layers"]["unet.conv_in"]
        layer["output"] = [0.3 * value for value in layer["output"]]  # PyTorch then cuts what the program does not
        ranges.write_text(json.dumps(changed))
        ran = turbopocket("check", built.folder)
        assert ran.code == 3
        assert "unet.conv_in" in ran.err
        ranges.unlink()
        ran = turbopocket("check", built.folder)
        assert ran.code == 1
        assert f"{RANGES_FILE}: not a file of ranges: " in ran.err
    finally:
        ranges.write_text(kept)


def test_several_pictures_at_once_are_those_drawn_one_by_one(built: Built) -> None:
    """A program takes one item, so the runner runs it once for each."""
    manifest = load_manifest(built.folder)
    drawing = open_runner(built.folder, manifest), manifest, open_tokenizers(built.folder, manifest)
    found = generate_batch(*drawing, ["a red ring", "a blue ring"], [1, 2])
    assert (found[0] != found[1]).any()
    for picture, prompt, seed in zip(found, ["a red ring", "a blue ring"], [1, 2], strict=True):
        assert (picture == generate(*drawing, prompt, seed)).all()
