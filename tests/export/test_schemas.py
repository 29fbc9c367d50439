# SPDX-License-Identifier: Apache-2.0
"""Artifacts that an older turbopocket built are read, checked and drawn; a golden manifest of each schema is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.table import sampler_table
from turbopocket.runtimes.manifest import load_manifest

GOLDEN = Path(__file__).parents[1] / "golden"
BUILDS = ("sdxl", "coreml-guided", "coreml-chunks")
"""SDXL for ONNX, to a budget; SDXL with guidance as packages; SD with an encoder, its UNet in two packages."""


def golden(schema: int, build: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GOLDEN / f"manifest-{schema}-{build}.json").read_text("utf-8"))
    return values


def read(values: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(values))
    return load_manifest(folder)


@pytest.mark.parametrize("build", BUILDS)
def test_an_old_manifest_says_what_the_same_build_says_now(build: str, tmp_path: Path) -> None:
    old, new = read(golden(1, build), tmp_path), read(golden(2, build), tmp_path)
    assert new.sampler_table is not None
    measured = {"sampler_table", "files", "plan", "parity"}
    assert old.model_dump(exclude=measured) == new.model_dump(exclude=measured)


@pytest.mark.parametrize("build", ["coreml-guided", "coreml-chunks"])
def test_schema_2_changed_no_file_but_the_manifest(build: str) -> None:
    """The third build has a budget, of which the longer manifest took some bytes of one layer."""
    old, new = golden(1, build), golden(2, build)
    assert old["plan"]["formats"] == new["plan"]["formats"]
    assert (old["files"], old["parity"]) == (new["files"], new["parity"])


@pytest.mark.parametrize("build", BUILDS)
def test_a_golden_table_is_the_one_that_is_drawn_with_now(build: str, tmp_path: Path) -> None:
    manifest = read(golden(2, build), tmp_path)
    first_picture = manifest.pipeline.encoder is not None
    assert manifest.sampler_table == sampler_table(manifest.sampler, first_picture)


def test_an_artifact_of_schema_1_is_checked_and_draws_the_same_picture(
    artifact: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    drawn = []
    file = artifact / "manifest.json"
    now = json.loads(file.read_text())
    plan = golden(1, "sdxl")["plan"] | {"formats": now["plan"]["schemes"]}
    old = golden(1, "sdxl") | {"files": now["files"], "recipe": now["recipe"], "plan": plan}
    for name, values in (("now", now), ("old", old)):
        file.write_text(json.dumps(values))
        ran = turbopocket("generate", artifact, "a red circle", "-o", tmp_path / f"{name}.png")
        assert ran.code == 0, ran.err
        drawn.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert (drawn[0] == drawn[1]).all()
    assert turbopocket("check", artifact).code == 0


def test_an_artifact_from_before_there_were_sizes_draws_that_of_its_image(tmp_path: Path) -> None:
    values = golden(1, "sdxl")
    del values["sizes"]
    assert read(values, tmp_path).sizes == [(32, 32)]


def test_an_lcm_of_schema_1_is_told_its_guidance_and_asked_once(tmp_path: Path) -> None:
    values = golden(1, "coreml-guided")
    values["components"]["unet"]["inputs"].append({"name": "timestep_cond", "dtype": "float32", "shape": ["batch", 12]})
    manifest = read(values, tmp_path)
    assert manifest.pipeline.guidance_inputs == {"timestep_cond": 12}
    assert manifest.components["unet"].inputs[0].shape[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("image"),
        lambda values: values.update(family="flux"),
        lambda values: values.update(components=[]),
        lambda values: values["components"]["text_encoder"].pop("outputs"),
        lambda values: values["components"].pop("unet"),
        lambda values: values.pop("force_zeros_for_empty_prompt"),
        lambda values: values["sampler"].update(guidance_scale="much"),
        lambda values: values["components"]["unet"]["inputs"][0].update(shape=3),
    ],
)
@pytest.mark.parametrize("build", ["sdxl", "coreml-guided"])
def test_a_broken_manifest_of_schema_1_is_refused_in_a_sentence(
    build: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    values = golden(1, build)
    change(values)
    with pytest.raises(TurbopocketError, match=r"manifest\.json(: | is not what schema_version 1 says)"):
        read(values, tmp_path)


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match="has schema_version 3: this version reads 1 to 2") as caught:
        read(golden(2, "sdxl") | {"schema_version": 3}, tmp_path)
    assert caught.value.hint == "a newer turbopocket wrote it: install that"
