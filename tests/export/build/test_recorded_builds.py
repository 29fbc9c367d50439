# SPDX-License-Identifier: Apache-2.0
"""Whatever a kill leaves of a real build, the next command finds one output whole; see `recorded_builds`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECORDED_BUILDS = Path(__file__).with_name("recorded_builds.py")
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "onnx": ({"name": "onnx"}, 1),
    "onnx, two workers": ({"name": "onnx"}, 2),
    "executorch": ({"name": "executorch"}, 1),
    "coreml": ({"name": "coreml"}, 1),
    "onnx and coreml": ({"name": "onnx", "also": ["coreml"]}, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases lie, and what they trace alike."""
    return tmp_path_factory.mktemp("recorded")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_each_state_of_the_disk_in_a_build_leaves_one_output_whole(
    case: str, recipe_values: dict[str, Any], tiny_sd: Path, folder: Path
) -> None:
    target, workers = CASES[case]
    floats = "fp32" if target["name"] == "executorch" else "fp16"
    asked = {"compress": {"formats": [floats, "int8-row"], "fit": "absmax"}, "sampler": {"steps": 1, "guidance": 1.0}}
    values = json.dumps({**recipe_values, **asked, "model": {"source": str(tiny_sd)}, "target": target})
    ran = subprocess.run(
        [sys.executable, RECORDED_BUILDS, values, str(folder / case), str(workers)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for build, found in json.loads(ran.stdout).items():
        print(f"{case}, {build} build: {found['states']} states, found {found['ends']}; beside {found['beside']}")
        assert found["states"] > 50
        assert found["ends"].keys() == {"new", "absent" if build == "first" else "old"}
        assert found["beside"]["busy"] > 50
