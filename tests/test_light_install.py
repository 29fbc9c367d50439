# SPDX-License-Identifier: Apache-2.0
"""What the base dependencies alone can do: open an artifact, verify its files and draw from it."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROMPT = "a red circle"

ONLY = """
import re, sys
from importlib import metadata

def name_of(requirement):
    return re.match(r"[\\w.-]+", requirement)[0].lower().replace("_", "-")

kept, new = set(), [name_of(each) for each in {requirements}]
while new:
    if (name := new.pop()) not in kept:
        kept.add(name)
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # for another system
        new += [name_of(each) for each in needs if "extra ==" not in each]
other = {{
    module for module, owners in metadata.packages_distributions().items()
    if not kept & {{owner.lower().replace("_", "-") for owner in owners}} and module not in ("turbopocket", "api")
}}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in other:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

assert "torch" in other and "onnx" in other and "numpy" not in other
sys.meta_path.insert(0, Absent())
metadata.requires = lambda _: {extras}
from turbopocket.cli import main
main()
"""


def light(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command where nothing but the base dependencies, and what these need, can be imported."""
    extras = [
        f'{each}; extra == "{name}"' for name, needed in PROJECT["optional-dependencies"].items() for each in needed
    ]
    code = ONLY.format(requirements=PROJECT["dependencies"], extras=extras)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def artifact(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from turbopocket.export.build.build import build
    from turbopocket.export.progress import StageProgress
    from turbopocket.export.recipe import make_recipe

    short = {"sampler": {"steps": 1}, "calibrate": {"pictures": 1}, "parity": {"pictures": 1}}
    values = {"model": {"source": str(tiny_sdxl)}, "compress": {"formats": ["int8-row"], "fit": "absmax"}, **short}
    out = tmp_path_factory.mktemp("light") / "art"
    return build(make_recipe(values, "test"), out, progress=StageProgress(quiet=True)).folder


def test_a_picture_is_drawn(artifact: Path, tmp_path: Path) -> None:
    done = light("generate", artifact, PROMPT, "-o", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    "verb", [("plan", "pocket"), ("build", "--out", "x"), ("check", "ARTIFACT"), ("models",), ("formats",)]
)
def test_any_other_verb_says_in_one_line_what_to_install(
    verb: tuple[str, ...], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = light(*(artifact if word == "ARTIFACT" else word for word in verb))
    assert done.returncode == 1
    said, hint = done.stderr.splitlines()
    assert said.endswith("which is not installed here")
    assert hint.startswith("hint: pip install torch==")
    assert all(each.partition(">")[0].partition("=")[0] in hint for each in PROJECT["optional-dependencies"]["build"])


def test_help_and_version_need_no_more() -> None:
    assert light("build", "--help").returncode == 0
    assert light("--version").stdout.startswith("turbopocket ")
