# SPDX-License-Identifier: Apache-2.0
"""`build --guidance`, `generate --guidance --negative`: what reaches the picture, what is said where nothing does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.output.names import WEIGHTS_FILE
from turbopocket.export.output.staging import report_folder
from turbopocket.export.recipe import Recipe
from turbopocket.export.verify.diffusers_reference import diffusers_picture
from turbopocket.quant.compress import decompressed
from turbopocket.quant.store import load_weights
from turbopocket.runtimes.manifest import load_manifest

PROMPT, NEGATIVE = "a red circle on the blue square", "green triangle"
Run = Callable[..., Any]


def without_guidance(artifact: Path) -> Path:
    path = artifact / "manifest.json"
    values = json.loads(path.read_text())
    values["sampler"]["guidance_scale"] = 0.0
    path.write_text(json.dumps(values))
    return artifact


@pytest.mark.parametrize("negative", [None, NEGATIVE, ""])
def test_a_picture_away_from_a_negative_prompt_is_that_of_diffusers_with_the_stored_weights(
    artifact: Path, tiny_sdxl: Path, tmp_path: Path, turbopocket: Run, negative: str | None
) -> None:
    asked = ["--negative", negative] if negative is not None else []
    out = tmp_path / "out.png"
    ran = turbopocket("generate", artifact, PROMPT, "--seed", 3, "--guidance", 7, *asked, "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["negative_prompt"] == negative
    model = load(str(tiny_sdxl))
    modules = {component.name: component.module.model for component in components_of(model)}
    with decompressed(modules, load_weights(report_folder(artifact) / WEIGHTS_FILE)):
        expected = diffusers_picture(model, load_manifest(artifact), PROMPT, 3, negative, guidance=7.0)
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    assert np.abs(np.asarray(Image.open(out)) / 255 - expected).max() < 1 / 255


def test_the_negative_prompt_changes_the_picture(artifact: Path, tmp_path: Path, turbopocket: Run) -> None:
    pictures = []
    for asked in ([], ["--negative", NEGATIVE], ["--negative", "red"]):
        out = tmp_path / f"{len(pictures)}.png"
        ran = turbopocket("generate", artifact, PROMPT, *asked, "-o", out)
        assert ran.code == 0, ran.err
        pictures.append(out.read_bytes())
    assert len(set(pictures)) == 3


@pytest.mark.parametrize("guidance", [0, 1])
def test_a_negative_prompt_without_guidance_is_refused(
    artifact: Path, tmp_path: Path, turbopocket: Run, guidance: float
) -> None:
    asked = "--negative", NEGATIVE, "--guidance", guidance, "-o", tmp_path / "out.png"
    ran = turbopocket("generate", artifact, PROMPT, *asked)
    assert ran.code == 1
    assert f"a negative prompt has no effect at guidance {guidance}: it needs more than 1" in ran.err
    assert not (tmp_path / "out.png").exists()


def test_guidance_of_an_artifact_that_was_built_without_is_warned_of(
    artifact: Path, tmp_path: Path, turbopocket: Run
) -> None:
    told = "warning: tiny_sdxl was built for guidance 0, which is none; 5 was never checked with it\n"
    ask = "generate", without_guidance(artifact), PROMPT, "-o", tmp_path / "out.png", "--overwrite"
    assert turbopocket(*ask, "--guidance", 5).err == told
    assert turbopocket(*ask, "--guidance", 1).err == ""
    assert turbopocket(*ask).err == ""


def test_other_guidance_of_an_artifact_that_was_built_with_some_is_not_warned_of(
    artifact: Path, tmp_path: Path, turbopocket: Run
) -> None:
    assert turbopocket("generate", artifact, PROMPT, "--guidance", 9, "-o", tmp_path / "out.png").err == ""


def test_the_builds_guidance_is_the_recipes(
    tiny_sdxl: Path, tmp_path: Path, turbopocket: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []

    def build_targets(recipe: Recipe, *_: object) -> list[Any]:
        asked.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("turbopocket.export.build.targets.build_targets", build_targets)
    turbopocket("build", tiny_sdxl, "--guidance", 0, "--out", tmp_path / "art")
    assert asked[0].sampler.guidance == 0.0
    ran = turbopocket("build", tiny_sdxl, "--guidance", "nan", "--out", tmp_path / "art")
    assert ran.code == 1
    assert "sampler.guidance = nan" in ran.err
