# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a command leaves the old output or the new one, or what the next command makes one of them of.

The work of a build is left out: what counts is the order in which folders are made, moved and removed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("crash_cases.py")
NEXT = [(verb, after) for verb in ("build", "targets", "distill") for after in ("fails", "ends well")]


def holds(case: str, folder: Path, can_swap: bool, **asked: object) -> None:
    command = [sys.executable, CASES, case, folder / "w", json.dumps(asked), str(int(can_swap))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=[True, False], ids=["swap", "two renames"])
def can_swap(request: pytest.FixtureRequest) -> bool:
    """File systems with an exchange of two folders, and those without."""
    return bool(request.param)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("verb", "next_command"), [*NEXT, ("build", "reads")])
def test_after_a_kill_at_any_operation_the_next_command_finds_one_output_whole(
    verb: str, overwrite: bool, next_command: str, can_swap: bool, tmp_path: Path
) -> None:
    asked = {"verb": verb, "overwrite": overwrite, "next_command": next_command}
    holds("next_command_after_a_kill", tmp_path, can_swap, **asked)


def test_a_command_killed_while_it_puts_things_right_leaves_that_to_the_next(can_swap: bool, tmp_path: Path) -> None:
    holds("next_command_after_a_kill_of_the_next", tmp_path, can_swap)
