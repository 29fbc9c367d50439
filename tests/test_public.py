# SPDX-License-Identifier: Apache-2.0
"""What `import turbopocket` offers: its names, what they cost to import, and drawing where PyTorch is not installed."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import turbopocket

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "coremltools",
    "executorch",
    "pydantic",
    "PIL",
    "rich",
)

SURFACE = {
    *("Artifact", "Built", "Checked", "DistillRecipe", "Distilled", "LoadedModel", "OverBudget", "ParityFailed"),
    *("Planned", "Recipe", "StageProgress", "TurbopocketError", "Workers"),
    *("build", "build_targets", "check", "distill", "load", "load_distill_recipe", "load_recipe", "plan"),
}


def test_the_surface_is_these_names() -> None:
    assert set(turbopocket.__all__) == SURFACE
    assert set(dir(turbopocket)) >= SURFACE
    assert sorted(turbopocket.__all__) == list(turbopocket.__all__)


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_name_is_there_typed_and_documented(name: str) -> None:
    value: Any = getattr(turbopocket, name)
    assert value.__module__.startswith("turbopocket.")
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'compress'"):
        _ = turbopocket.compress  # type: ignore[attr-defined]


def ran(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_windows_is_refused_in_one_sentence() -> None:
    """It has none of the modules that locks, signals and memory limits are made of."""
    found = ran("import sys; sys.platform = 'win32'; import turbopocket")
    assert "ImportError: turbopocket needs Linux or macOS, this system is Windows" in found.stderr


def test_the_import_alone_brings_nothing_heavy() -> None:
    done = ran(f"import sys, turbopocket; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


WITHOUT_PYTORCH = """
import sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None  # what Python's import then finds absent
import turbopocket
picture = turbopocket.Artifact.open(sys.argv[1]).generate("a red circle", seed=7)
picture.save(sys.argv[2])
print(picture.mode, picture.size)
"""


def test_an_artifact_draws_where_pytorch_is_not_installed(tiny_sdxl: Path, tmp_path: Path) -> None:
    from turbopocket.export.recipe import make_recipe

    short = {"sampler": {"steps": 2, "guidance": 1.0}, "calibrate": {"pictures": 1}, "parity": {"pictures": 1}}
    values = {"model": {"source": str(tiny_sdxl)}, "compress": {"formats": ["int8-row"], "fit": "absmax"}, **short}
    quiet = turbopocket.StageProgress(quiet=True)
    built = turbopocket.build(make_recipe(values, "test"), str(tmp_path / "art"), progress=quiet)
    done = ran(WITHOUT_PYTORCH, built.folder, tmp_path / "a.png")
    assert done.stdout.strip() == "RGB (32, 32)", done.stderr
    artifact = turbopocket.Artifact.open(built.folder)
    picture = artifact.generate("a red circle", seed=7)
    picture.save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert artifact.generate("a red circle", seed=8).tobytes() != picture.tobytes()
    assert artifact.generate("a red circle", seed=7, size=artifact.manifest.sizes[0]).tobytes() == picture.tobytes()
    with pytest.warns(UserWarning, match="guidance 1, which is none; 3 was never checked"):
        pass_through = artifact.generate("a red circle", seed=7, guidance=3.0)
    assert pass_through.size == picture.size


def test_a_build_of_two_targets_is_another_functions() -> None:
    from turbopocket.export.recipe import make_recipe

    recipe = make_recipe({"target": {"name": "onnx", "also": ["executorch"]}}, "test")
    with pytest.raises(turbopocket.TurbopocketError, match="for one target, onnx, executorch are asked for"):
        turbopocket.build(recipe, "nowhere")
