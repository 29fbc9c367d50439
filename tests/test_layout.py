# SPDX-License-Identifier: Apache-2.0
"""The shape of the house, as facts: what is packaged, how long things are, and who imports PyTorch."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ground", "quant", "runtimes", "export", "pocket", "api")
PACKAGES = {"api": "turbopocket"}
"""Folders whose package has not their name in `turbopocket`."""
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_every_folder_of_code_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert listed == {PACKAGES.get(folder, f"turbopocket.{folder.replace('/', '.')}") for folder in folders}


def test_links_are_the_package() -> None:
    """What the type checker and the import contracts see, and what a second checkout runs."""
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "turbopocket").iterdir()}
    own = {path.name: path for path in (ROOT / "api").iterdir() if path.suffix in (".py", ".typed")}
    assert links == own | {folder: ROOT / folder for folder in FOLDERS if folder not in PACKAGES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_stay_readable(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_FILE_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_folder_can_not_be_imported(folder: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"import {PACKAGES.get(folder, f'turbopocket.{folder}')}, not {folder}" in ran.stderr


def test_what_draws_on_a_phone_never_imports_pytorch() -> None:
    code = (
        "import sys; import turbopocket.cli, turbopocket.export.artifact, turbopocket.runtimes.onnx.runner; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
