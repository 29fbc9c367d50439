# SPDX-License-Identifier: Apache-2.0
"""An artifact says what it was made from, not where that lay: the same bytes from any folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.recipe import make_recipe

Run = Callable[..., Any]
QUICK = ("--formats", "fp16", "--fit", "absmax", "--steps", 1, "--guidance", 1)
SHORT = ("--set", "calibrate.pictures=1", "--set", "parity.pictures=1")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_paths_of_a_model_give_one_artifact_that_checks_from_any_folder(
    turbopocket: Run, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "here", tmp_path / "a" / "much" / "longer" / "path"
    for place in places:
        shutil.copytree(tiny_sd, place / "model")
        monkeypatch.chdir(place)
        ran = turbopocket("build", "model", *QUICK, *SHORT, "--out", "art")
        assert ran.code == 0, ran.err
    first, second = (contents(place / "art") for place in places)
    assert first == second
    assert str(tmp_path).encode() not in b"".join(first.values())
    monkeypatch.chdir(tmp_path)
    assert turbopocket("check", places[0] / "art").code == 0
    changed = places[0] / "model" / "unet" / "config.json"
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {"norm_eps": 2e-5}))
    ran = turbopocket("check", places[0] / "art")
    assert ran.code == 1
    assert "is not the model that" in ran.err


def test_a_recipe_is_shipped_with_names_and_kept_with_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    values = {"source": "model", "config": "owner/name", "lora": ["styles/a.safetensors:0.5"]}
    recipe = make_recipe({"model": values, "calibrate": {"prompts": "/home/me/prompts.txt"}}, "test")
    shipped, kept = recipe.without_places("my-model"), recipe.with_whole_paths()
    assert (shipped.model.source, shipped.model.config) == ("my-model", "owner/name")
    assert shipped.model.lora == (LoraFile(Path("a.safetensors"), 0.5),)
    assert shipped.calibrate.prompts == Path("prompts.txt")
    assert (kept.model.source, kept.model.config) == (str(tmp_path / "model"), "owner/name")
    assert kept.model.lora == (LoraFile(tmp_path / "styles" / "a.safetensors", 0.5),)
    bundled = make_recipe({"model": {"source": "pocket"}}, "test")
    assert bundled.without_places("pocket") == bundled.with_whole_paths() == bundled
