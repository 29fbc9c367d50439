# SPDX-License-Identifier: Apache-2.0
"""Learned rounding inside a build: only the denoiser's, after the other layers are stored, and picked up again."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build import reconstructing
from turbopocket.export.build.build import build
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import reconstruct_blocks
from turbopocket.quant.reconstruct import reconstruct

QUIET = StageProgress(quiet=True)
LEARN = {"iterations": 20, "batch": 2, "learning_rate": 0.1}


@pytest.fixture
def values(tiny_sd: Path, recipe_values: dict[str, Any]) -> dict[str, Any]:
    compress = recipe_values["compress"] | {"fit": "reconstruct", "budget": "1100kB"}
    return {**recipe_values, "model": {"source": str(tiny_sd)}, "compress": compress, "reconstruct": LEARN}


def test_what_is_learned_is_what_is_shipped_and_goes_on_where_it_was_cut_short(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, units = make_recipe(values, "test"), tmp_path / "art", []

    def cut_short(*args: Any) -> Any:
        if len(units) == 3:
            raise KeyboardInterrupt
        units.append(0)
        return reconstruct(*args)

    with monkeypatch.context() as patched:
        patched.setattr(reconstruct_blocks, "reconstruct", cut_short)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, out, progress=QUIET)
    (partial,) = tmp_path.glob("art.run/reconstruct-*.partial")
    assert len(list((partial / "units").iterdir())) == 3

    made = []
    monkeypatch.setattr(reconstruct_blocks, "reconstruct", lambda *args: made.append(0) or reconstruct(*args))  # type: ignore[func-returns-value]
    built = build(recipe, out, progress=QUIET, keep=True)
    measured = json.loads((built.report.parent / "measurements.json").read_text())
    errors = measured["reconstruction"]
    assert len(made) == len(errors) - 3
    assert "temporal" in errors
    assert all(name == "temporal" or name.startswith("unet.") for name in errors)
    assert not any(name.startswith("unet.time_embedding") for name in errors)  # TIAR has them
    assert sum(error["after"] < error["before"] for error in errors.values()) > 0.7 * len(errors)
    assert built.gaps.failure is None
    assert "Learned rounding" in built.report.read_text()
    assert not list(tmp_path.glob("art.run/reconstruct-*/inputs"))


def test_other_fits_learn_nothing(tiny_sd: Path, recipe_values: dict[str, Any]) -> None:
    recipe = make_recipe({**recipe_values, "model": {"source": str(tiny_sd)}}, "test")
    bench: Any = type("Bench", (), {"recipe": recipe})
    stored: dict[str, Any] = {"unet.conv_in": None}
    found = reconstructing.reconstructed(bench, None, {}, None, stored, None)  # type: ignore[arg-type]
    assert found == (stored, {})


def test_blocks_are_not_fitted_twice(values: dict[str, Any]) -> None:
    with pytest.raises(TurbopocketError, match="fit = reconstruct goes by blocks itself.* leave out sequential"):
        make_recipe({**values, "compress": {**values["compress"], "sequential": True}}, "test")
