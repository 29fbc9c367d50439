# SPDX-License-Identifier: Apache-2.0
"""Single-file checkpoints in the original layout: the same modules as diffusers' own `from_single_file` gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turbopocket.export.families import LoadedModel, load

from .single_files import original, write_single_file


@pytest.fixture(scope="module")
def sdxl_tensors(tiny_sdxl: Path) -> dict[str, Tensor]:
    return original(load(str(tiny_sdxl)).modules)


@pytest.fixture(scope="module")
def sd_tensors(tiny_sd: Path) -> dict[str, Tensor]:
    return original(load(str(tiny_sd)).modules)


@pytest.fixture(scope="module")
def sdxl_file(sdxl_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tmp_path_factory.mktemp("files") / "dream_xl.safetensors", sdxl_tensors)


@pytest.fixture(scope="module")
def sd_file(sd_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tmp_path_factory.mktemp("files") / "dream.safetensors", sd_tensors)


def _same(found: LoadedModel, expected: Any) -> bool:
    """Whether every module's tensors are those of a model or of a diffusers pipeline, bit for bit."""
    for name, module in found.modules.items():
        other = expected.modules[name] if isinstance(expected, LoadedModel) else getattr(expected, name)
        theirs = other.state_dict()
        if module.state_dict().keys() != theirs.keys():
            return False
        if not all(torch.equal(tensor, theirs[key]) for key, tensor in module.state_dict().items()):
            return False
    return True


@pytest.mark.parametrize(("family", "name"), [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd")])
def test_modules_are_those_that_diffusers_loads_from_the_same_file(
    family: str, name: str, request: pytest.FixtureRequest
) -> None:
    import diffusers

    file, folder = request.getfixturevalue(f"{name}_file"), request.getfixturevalue(f"tiny_{name}")
    theirs = getattr(diffusers, family).from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = load(str(file), config=str(folder))
    assert _same(ours, theirs)
    assert _same(ours, load(str(folder)))
    assert (ours.name, ours.family, ours.has_weights) == (file.stem, name, True)
