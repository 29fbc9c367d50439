# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed at random moments end with the bytes of one that is not; see `killed_builds`."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

KILLED_BUILDS = Path(__file__).with_name("killed_builds.py")
TUNED = {
    "compress": {"formats": ["int4-g32", "fp16"], "sequential": True},
    "finetune": {"iterations": 2, "pictures": 2},
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "onnx": (100, {}),
    "sequential and fine-tuned": (200, TUNED),
    "executorch": (20, {"target": {"name": "executorch"}}),
    "coreml": (20, {"target": {"name": "coreml"}}),
}


def recipe(recipe_values: dict[str, Any], model: Path, asked: dict[str, Any]) -> dict[str, Any]:
    shared = {"model": {"source": str(model)}, "compress": {"formats": ["fp16", "int8-row"]}}
    return {**recipe_values, **shared, **asked}


def require_same_files(values: dict[str, Any], folder: Path, kills: int) -> None:
    """Kills builds so often, and prints where; every one that was then let end has the files of the undisturbed one."""
    asked = json.dumps(values), str(folder), str(kills), "0", str(torch.get_num_threads())
    ran = subprocess.run([sys.executable, KILLED_BUILDS, *asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    stages = Counter(stage for stage, _ in found["killed"])
    files = found["files"]
    print(f"undisturbed {found['seconds']:.1f} s; {len(files) - 1} builds, killed in {dict(stages)}")
    assert len(found["killed"]) == kills
    undisturbed = files.pop("undisturbed")
    assert undisturbed
    assert files
    assert all(each == undisturbed for each in files.values())


def test_builds_killed_at_random_moments_end_with_the_same_bytes(
    recipe_values: dict[str, Any], tiny_sd: Path, tmp_path: Path
) -> None:
    require_same_files(recipe(recipe_values, tiny_sd, {}), tmp_path / "kills", 4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES)
def test_builds_killed_again_and_again_end_with_the_same_bytes(
    case: str, recipe_values: dict[str, Any], tiny_sd: Path, tmp_path: Path
) -> None:
    kills, asked = CASES[case]
    require_same_files(recipe(recipe_values, tiny_sd, asked), tmp_path / "kills", kills)
