# SPDX-License-Identifier: Apache-2.0
"""One small artifact for all tests that only read one."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from .checkpoint.single_files import original, write_single_file

BUILD = {
    "sampler": {"steps": 2},
    "calibrate": {"pictures": 1},
    "parity": {"pictures": 1},
    "compress": {"formats": ["int4-g32", "int8-g32", "fp16"], "budget": "1900kB"},
}


@pytest.fixture(autouse=True)
def forgotten_precision() -> Iterator[None]:
    """Accelerate keeps the first precision of a process; a command has a process of its own, and tests share one."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def recipe_values() -> dict[str, Any]:
    """A build that is as short as a build can be."""
    return BUILD


@pytest.fixture(scope="session")
def recipe_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe as a file."""
    file = tmp_path_factory.mktemp("recipe") / "short.toml"
    file.write_text(tomli_w.dumps(BUILD))
    return file


@pytest.fixture(scope="session")
def sdxl_tensors(tiny_sdxl: Path) -> dict[str, Any]:
    """The tiny SDXL checkpoint's tensors as in a single file."""
    from turbopocket.export.checkpoint.load import load

    return original(load(str(tiny_sdxl)).modules)


@pytest.fixture(scope="session")
def sd_tensors(tiny_sd: Path) -> dict[str, Any]:
    """The tiny SD 1.x checkpoint's tensors as in a single file."""
    from turbopocket.export.checkpoint.load import load

    return original(load(str(tiny_sd)).modules)


@pytest.fixture(scope="session")
def sdxl_file(sdxl_tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL checkpoint as a single file."""
    return write_single_file(tmp_path_factory.mktemp("files") / "dream_xl.safetensors", sdxl_tensors)


@pytest.fixture(scope="session")
def sd_file(sd_tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1.x checkpoint as a single file."""
    return write_single_file(tmp_path_factory.mktemp("files") / "dream.safetensors", sd_tensors)


@pytest.fixture(scope="session")
def built(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of one build of the tiny SDXL checkpoint. Read it, do not change it: see `artifact`."""
    from turbopocket.export.build.build import build
    from turbopocket.export.progress import StageProgress
    from turbopocket.export.recipe import make_recipe

    recipe = make_recipe({**BUILD, "model": {"source": str(tiny_sdxl)}}, "test")
    return build(recipe, tmp_path_factory.mktemp("built") / "art", overwrite=False, progress=StageProgress(quiet=True))


@pytest.fixture
def artifact(built: Any, tmp_path: Path) -> Path:
    """A copy of the built artifact, with its report beside it, to do anything to."""
    for folder in (built.folder, built.report.parent):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / built.folder.name
