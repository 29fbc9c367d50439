# SPDX-License-Identifier: Apache-2.0
"""Several targets in one command: an artifact for each, all of them or none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build import targets as module
from turbopocket.export.output.staging import report_folder
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.ground.errors import ParityFailed, TurbopocketError

from ..stand_ins import put_artifact, put_report


@dataclass(frozen=True)
class Made:
    folder: Path
    report: Path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Builds that write next to nothing; those for coreml fail."""
    asked: list[Recipe] = []

    def build(recipe: Recipe, out: Path, overwrite: bool, progress: Any, workers: Any, keep: Any, run: Any) -> Made:
        asked.append(recipe)
        put_artifact(out, recipe.target.name)
        put_report(report_folder(out))
        if recipe.target.name == "coreml":
            raise ParityFailed("planted")
        return Made(out, report_folder(out) / "report.html")

    monkeypatch.setattr(module, "build", build)
    return asked


def recipe(*names: str) -> Recipe:
    return make_recipe({"target": {"name": names[0], "also": list(names[1:])}, "seed": 3}, "test")


def test_each_target_gets_a_folder_of_its_name_and_a_recipe_of_its_own(builds: list[Recipe], tmp_path: Path) -> None:
    made = module.build_targets(recipe("onnx", "executorch"), tmp_path / "both", overwrite=False, quiet=True)
    assert [each.folder for each in made] == [tmp_path / "both" / "onnx", tmp_path / "both" / "executorch"]
    assert [each.report for each in made] == [
        tmp_path / "both" / f"{name}.report" / "report.html" for name in ("onnx", "executorch")
    ]
    assert (made[1].folder / "model.onnx").read_text() == "executorch"
    assert [(each.target.name, each.target.also, each.seed) for each in builds] == [
        ("onnx", (), 3),
        ("executorch", (), 3),
    ]


def test_one_target_keeps_the_output_folder_for_itself(builds: list[Recipe], tmp_path: Path) -> None:
    (made,) = module.build_targets(recipe("onnx"), tmp_path / "one", overwrite=False, quiet=True)
    assert made.folder == tmp_path / "one"


def test_when_the_second_fails_neither_is_written(builds: list[Recipe], tmp_path: Path) -> None:
    with pytest.raises(ParityFailed, match="planted"):
        module.build_targets(recipe("onnx", "coreml"), tmp_path / "both", overwrite=False, quiet=True)
    assert len(builds) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_artifacts_may_be_replaced_and_nothing_else(builds: list[Recipe], tmp_path: Path) -> None:
    both = tmp_path / "both"
    module.build_targets(recipe("onnx", "executorch"), both, overwrite=False, quiet=True)
    with pytest.raises(TurbopocketError, match="is not empty"):
        module.build_targets(recipe("onnx", "executorch"), both, overwrite=False, quiet=True)
    module.build_targets(recipe("onnx", "executorch"), both, overwrite=True, quiet=True)
    (both / "thesis.txt").write_text("precious")
    with pytest.raises(TurbopocketError, match="so it is not an artifact"):
        module.build_targets(recipe("onnx", "executorch"), both, overwrite=True, quiet=True)
    assert (both / "thesis.txt").read_text() == "precious"


def test_a_target_may_be_asked_for_once(tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    ran = turbopocket("build", "pocket", "--target", "onnx", "--target", "onnx", "--out", tmp_path / "x")
    assert ran.code == 1
    assert "targets onnx, onnx: each may be asked for once" in ran.err
