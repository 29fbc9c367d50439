# SPDX-License-Identifier: Apache-2.0
"""Whatever a kill leaves of a real build, the next command finds one output whole; see `recorded_builds`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECORDED_BUILDS = Path(__file__).with_name("recorded_builds.py")
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "onnx": ({"name": "onnx"}, 1, True),
    "onnx, first": ({"name": "onnx"}, 1, False),
    "onnx, two workers": ({"name": "onnx"}, 2, True),
    "executorch": ({"name": "executorch"}, 1, True),
    "coreml": ({"name": "coreml"}, 1, True),
    "onnx and coreml": ({"name": "onnx", "also": ["coreml"]}, 1, True),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_each_state_of_the_disk_in_a_build_leaves_one_output_whole(
    case: str, recipe_values: dict[str, Any], tiny_sd: Path, tmp_path: Path
) -> None:
    target, workers, overwrite = CASES[case]
    floats = "fp32" if target["name"] == "executorch" else "fp16"
    shared = {"model": {"source": str(tiny_sd)}, "compress": {"formats": [floats, "int8-row"], "fit": "absmax"}}
    values = json.dumps({**recipe_values, **shared, "target": target})
    asked = values, str(tmp_path / "recorded"), str(workers), str(int(overwrite)), "3"
    ran = subprocess.run([sys.executable, RECORDED_BUILDS, *asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    print(f"{case}: {found['states']} states, found {found['ends']}")
    assert found["states"] > 50
    assert found["ends"].keys() == {"new", "old" if overwrite else "absent"}
