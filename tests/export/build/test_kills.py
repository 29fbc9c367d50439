# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed at random moments end with the bytes of one that is not; see `killed_builds`."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

KILLED_BUILDS = Path(__file__).with_name("killed_builds.py")
TUNED = {
    "compress": {"formats": ["int4-g32", "fp16"], "sequential": True},
    "finetune": {"iterations": 2, "pictures": 2},
}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "onnx": (4, 25, {}),
    "sequential and fine-tuned": (5, 40, TUNED),
    "executorch": (2, 10, {"target": {"name": "executorch"}, "compress": {"formats": ["fp32", "int8-row"]}}),
    "coreml": (2, 10, {"target": {"name": "coreml"}}),
}
"""How many lives of builds, how many kills in each, and what is asked for."""
LIVES = [(case, life) for case, (lives, _, _) in CASES.items() for life in range(lives)]

Live = Callable[[str, int, int], None]


def output_of(*arguments: object) -> str:
    ran = subprocess.run([sys.executable, KILLED_BUILDS, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def live(recipe_values: dict[str, Any], tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Kills builds of a case so often, from a seed, and prints where; lives of one case share the undisturbed build."""
    shared = {"model": {"source": str(tiny_sd)}, "compress": {"formats": ["fp16", "int8-row"]}}
    threads = torch.get_num_threads()

    @cache
    def undisturbed(case: str) -> tuple[str, Path]:
        values, folder = json.dumps({**recipe_values, **shared, **CASES[case][2]}), tmp_path_factory.mktemp("kills")
        output_of(values, folder, threads)
        return values, folder

    def run(case: str, seed: int, kills: int) -> None:
        found = json.loads(output_of(*undisturbed(case), threads, kills, seed))
        stages = Counter(place.rpartition(", ")[0] for place in found["killed"])
        print(f"{case}, life {seed}: {found['ended']} builds, killed in {dict(stages)}")
        assert stages.total() == kills

    return run


def test_builds_killed_at_random_moments_end_with_the_same_bytes(live: Live) -> None:
    live("onnx", 0, 4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("case", "life"), LIVES)
def test_builds_killed_again_and_again_end_with_the_same_bytes(case: str, life: int, live: Live) -> None:
    live(case, life + 1, CASES[case][1])
