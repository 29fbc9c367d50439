# SPDX-License-Identifier: Apache-2.0
"""A build for ExecuTorch with static steps, end to end: parity by layer, `check`, and what it needs beside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.output.names import CHOICES_FILE, RANGES_FILE
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.quant.ranges import load_ranges
from turbopocket.quant.rounding import keeps_digits
from turbopocket.quant.sensitivity import load_choices
from turbopocket.runtimes.drawing.text_to_image import generate, generate_batch
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.open import open_runner

pytest.importorskip("executorch")

PINNED = "unet.conv_out"
"""A layer that would have static scales, if the pin did not say otherwise."""
STATIC = "unet.time_embedding.linear_1"


@pytest.fixture(scope="module")
def built(tiny_sdxl: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    wanted = {
        "target": {"name": "executorch", "executorch": {"activations": "static"}},
        "compress": {"formats": ["int8-row"], "fit": "absmax", "pin": {PINNED: "int8-row+a8-dynamic"}},
        "model": {"source": str(tiny_sdxl)},
    }
    out = tmp_path_factory.mktemp("executorch") / "art"
    recipe = make_recipe({**recipe_values, **wanted}, "test")
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


def test_the_plan_says_the_bytes(built: Built) -> None:
    assert built.total_bytes <= built.plan.total_bytes
    # 0.5 % on pocket-turbo; on so small a model graphs, which are counted at most, are half of the bytes
    assert built.total_bytes == pytest.approx(built.plan.total_bytes, rel=0.06)


def test_which_layers_are_static_is_decided_and_told_by_name(built: Built) -> None:
    ranges = load_ranges(built.report.parent / RANGES_FILE)
    expected = {
        layer: "int8-row+a8-static" if keeps_digits(seen) and layer != PINNED else "int8-row+a8-dynamic"
        for layer, seen in ranges.items()
    }
    assert keeps_digits(ranges[PINNED])
    assert expected[STATIC] == "int8-row+a8-static"
    assert set(expected.values()) == {"int8-row+a8-static", "int8-row+a8-dynamic"}
    assert {layer: str(scheme) for layer, scheme in built.plan.schemes.items()} == expected
    plan = load_manifest(built.folder).plan
    assert plan is not None
    assert plan["schemes"] == expected
    choices = load_choices(built.report.parent / CHOICES_FILE)
    assert {layer: choices[layer].candidates[0].scheme for layer in expected} == expected
    static = list(expected.values()).count("int8-row+a8-static")
    assert built.summary()["schemes"]["int8-row+a8-static"] == static
    assert f'int8-row+a8-static</th><td class="n">{static}</td>' in built.report.read_text()


def test_an_artifact_from_before_schemes_is_checked_by_its_recipe(
    built: Built, turbopocket: Callable[..., Any], tmp_path: Path
) -> None:
    """Its plan has weight formats; the rule for static scales is the one that its build went by."""
    for folder in (built.folder, built.report.parent):
        shutil.copytree(folder, tmp_path / folder.name)
    file = tmp_path / built.folder.name / "manifest.json"
    manifest = json.loads(file.read_text())
    names = dict.fromkeys(manifest["plan"].pop("schemes"), "int8-row")
    manifest["plan"]["formats"] = names | {PINNED: "int8-row+a8-dynamic"}  # which no pin could say then
    file.write_text(json.dumps(manifest))
    assert turbopocket("check", file.parent).code == 0
    del manifest["plan"]["formats"]
    file.write_text(json.dumps(manifest))
    ran = turbopocket("check", file.parent)
    assert ran.code == 1
    assert "has a plan without its layers' schemes" in ran.err


def test_a_plan_on_what_was_measured_has_the_scales_that_calibration_chose(
    built: Built, tiny_sdxl: Path, turbopocket: Callable[..., Any]
) -> None:
    asked = "plan", tiny_sdxl, "--formats", "int8-row", "--json", "--set", "target.executorch.activations=static"
    measured = "--measured", built.report.parent / CHOICES_FILE
    planned = json.loads(turbopocket(*asked, "--target", "executorch", *measured).out)
    assert planned["layers"] == {layer: str(scheme) for layer, scheme in built.plan.schemes.items()}
    assert planned["layers"][PINNED] == "int8-row+a8-dynamic"  # all that it was measured in
    shapes = json.loads(turbopocket(*asked, "--target", "executorch").out)
    assert set(shapes["layers"].values()) == {"int8-row+a8-static"}
    assert any("calibration leaves some of them dynamic" in note for note in shapes["notes"])
    onnx = json.loads(turbopocket(*asked, "--target", "onnx", *measured).out)
    assert set(onnx["layers"].values()) == {"int8-row"}


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
        layer = changed["layers"][STATIC]
        layer["output"] = [0.3 * value for value in layer["output"]]  # PyTorch then cuts what the program does not
        ranges.write_text(json.dumps(changed))
        ran = turbopocket("check", built.folder)
        assert ran.code == 3
        assert STATIC in ran.err
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
