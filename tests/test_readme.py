# SPDX-License-Identifier: Apache-2.0
"""What the README says is what was measured, and what it shows is what the command takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from turbopocket.export.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_measured_json() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shown_recipe_is_a_recipe() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert parse_recipe(shown, "README").compress.budget == "8MB"


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"!\[.*?\]\((.*?)\)", README))))
def test_shown_picture_is_there(picture: str) -> None:
    assert (ROOT / picture).is_file()


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"^turbopocket (\w+)", README, flags=re.MULTILINE))))
def test_shown_verb_is_a_verb(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from turbopocket.export.cli import main; main()", verb, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
