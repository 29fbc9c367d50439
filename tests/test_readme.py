# SPDX-License-Identifier: Apache-2.0
"""What the README says is what was measured, and what it shows is what the command takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

from turbopocket.export.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_measured_json() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shown_python_does_what_it_says(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exactly those lines; all that is changed is the shipped recipe `demo`, which is made short here."""
    (lines,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    short = {"sampler": {"steps": 2}, "calibrate": {"pictures": 1}, "parity": {"pictures": 1}}
    recipe = {"model": {"source": str(tiny_sdxl)}, "compress": {"budget": "1900kB"}, **short}
    (tmp_path / "demo.toml").write_text(tomli_w.dumps(recipe))
    monkeypatch.setattr("turbopocket.export.settings._shipped", lambda kind: tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    planned, built = capfd.readouterr().out.splitlines()
    assert int(planned.split()[0]) <= 1_900_000
    assert built.endswith("demo.report/report.html")
    assert sum(path.stat().st_size for path in Path("build/demo").rglob("*") if path.is_file()) == int(built.split()[0])
    with Image.open("build/demo.png") as picture:
        assert picture.size == (32, 32)


def test_shown_recipe_is_a_recipe() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert parse_recipe(shown, "README").compress.budget == "8MB"


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"!\[.*?\]\((.*?)\)", README))))
def test_shown_picture_is_there(picture: str) -> None:
    assert (ROOT / picture).is_file()


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"^turbopocket (\w+)", README, flags=re.MULTILINE))))
def test_shown_verb_is_a_verb(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from turbopocket.cli import main; main()", verb, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
