# SPDX-License-Identifier: Apache-2.0
"""The command line as people know others: help, version, silence, completion, kinds of pictures, JSON, closed pipes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export import listings
from turbopocket.export.target_options import TARGET_ENTRIES
from turbopocket.ground import extras
from turbopocket.quant.fit import FITS
from turbopocket.runtimes.arm64.cpus import CPUS

Run = Callable[..., Any]
MAIN = "from turbopocket.cli import main; main()"
VERBS = (
    *("build", "distill", "plan", "check", "generate", "report", "formats", "models"),
    *("calibrate", "measure", "compress", "lower", "clean"),
)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of the width that help is written for."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("asked", [(), ("-h",), ("--help",), ("recipe",), ("arm64",)])
def test_help_is_no_error_and_cuts_no_summary(turbopocket: Run, asked: tuple[str, ...]) -> None:
    ran = turbopocket(*asked)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Usage: turbopocket ")
    assert "..." not in ran.out.replace("[ARGS]...", "")
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_common_options_behind_its_name(turbopocket: Run, verb: str) -> None:
    said = turbopocket(verb, "-h").out
    assert all(option in said for option in ("-v, --verbose", "-q, --quiet", "-h, --help", "--json"))


def test_the_version_is_the_installed_ones(turbopocket: Run) -> None:
    from importlib.metadata import version

    assert turbopocket("--version").out == f"turbopocket {version('turbopocket')}\n"


@pytest.mark.parametrize(
    ("verb", "choices"),
    [
        ("build", [*TARGET_ENTRIES, *(fit.name for fit in FITS), "codebooks", "demo"]),
        ("plan", [*TARGET_ENTRIES, "codebooks", "demo"]),
        ("check", [f"arm64:{cpu.name}" for cpu in CPUS]),
        ("generate", [".png", ".jpg", ".webp"]),
        ("distill", ["pocket-turbo"]),
    ],
)
def test_help_lists_what_may_be_chosen(turbopocket: Run, verb: str, choices: list[str]) -> None:
    said = " ".join(turbopocket(verb, "--help").out.split()).replace("- ", "-")  # words may be broken there
    assert [choice for choice in choices if choice not in said] == []


def test_a_wrong_option_hints_at_its_verbs_help(turbopocket: Run) -> None:
    assert "hint: turbopocket plan --help" in turbopocket("plan", "--colour", "red").err
    assert "hint: turbopocket recipe show --help" in turbopocket("recipe", "show", "--colour").err
    assert "hint: turbopocket --help" in turbopocket("draw").err


def test_completion_knows_verbs() -> None:
    asked = {"_TURBOPOCKET_COMPLETE": "complete_bash", "COMP_WORDS": "turbopocket ge", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", MAIN], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["generate"], done.stderr


def test_with_json_an_error_is_the_one_object_on_stdout(turbopocket: Run, tmp_path: Path) -> None:
    ran = turbopocket("plan", "nowhere", "--json")
    told = json.loads(ran.out)
    assert (ran.code, told["exit_code"]) == (1, 1)
    assert told["error"].startswith("'nowhere' is neither")
    assert f"error: {told['error']}" in ran.err
    assert json.loads(turbopocket("check", tmp_path, "--json").out)["error"].endswith("holds no manifest.json")
    assert json.loads(turbopocket("plan", "--colour", "--json").out)["hint"] == "turbopocket plan --help"


@pytest.mark.parametrize("asked", [("formats",), ("clean", "none", "--json"), ("recipe", "show")])
def test_a_reader_that_ends_early_is_no_bug(asked: tuple[str, ...]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == ""
        assert command.wait() == 141


@pytest.mark.parametrize("where", [("-q", "formats"), ("formats", "-q")])
def test_quiet_is_heard_before_and_behind_the_verb(
    turbopocket: Run, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]
) -> None:
    from turbopocket.options import talk

    heard = []
    monkeypatch.setattr(listings, "format_rows", lambda: heard.append(talk(False)._quiet) or [])
    turbopocket(*where)
    assert heard == [True]
    turbopocket("formats")
    assert heard == [True, False]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_suffix_says_what_kind_of_picture_is_written(
    turbopocket: Run, artifact: Path, tmp_path: Path, name: str, kind: str
) -> None:
    ran = turbopocket("generate", artifact, "a red circle", "--steps", 1, "-o", tmp_path / name)
    assert ran.code == 0, ran.err
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind
        assert np.asarray(picture).shape == (32, 32, 3)


@pytest.mark.parametrize("name", ["a.gif", "a", "a.tiff"])
def test_another_suffix_is_refused_before_anything_is_opened(turbopocket: Run, tmp_path: Path, name: str) -> None:
    ran = turbopocket("generate", tmp_path / "none", "a red circle", "-o", tmp_path / name)
    assert "is of no kind that is written: known are .png, .jpg, .jpeg, .webp" in ran.err
    assert ran.code == 1


def test_a_shipped_recipe_is_found_beside_a_folder_of_its_name(
    turbopocket: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert 'budget = "8MB"' in turbopocket("recipe", "show", "demo").out


@pytest.mark.parametrize("options", [(), ("--distill",)])
def test_a_shown_recipe_names_every_key_and_reads_back(
    turbopocket: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(turbopocket("recipe", "show", *options).out)
    values = json.loads(turbopocket("recipe", "show", *options, "--json").out)
    text = file.read_text()
    for name, section in values.items():
        for key in section if isinstance(section, dict) else (name,):
            assert re.search(rf"^{key} = |\.{key}[,\]\n]", text, flags=re.MULTILINE), key
    assert json.loads(turbopocket("recipe", "show", file, *options, "--json").out) == values


def test_every_file_of_a_build_is_as_readable_as_the_users_others(artifact: Path) -> None:
    (artifact / "mine").touch()
    expected = (artifact / "mine").stat().st_mode
    files = [path for folder in (artifact, artifact.with_name("art.report")) for path in folder.rglob("*")]
    assert {
        path.name: path.stat().st_mode for path in files if path.is_file() and path.stat().st_mode != expected
    } == {}


REQUIREMENTS = (
    "numpy>=2.0",
    'torch==2.13.0; extra == "build"',
    'onnx==1.23.0; extra == "build"',
    'turbopocket[build]; extra == "coreml"',
    'coremltools==9.0; extra == "coreml"',
    "torchao<0.19,>=0.18; extra == 'executorch'",
    'torch==9; extra == "dev"',
)


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("torch", "pip install torch==2.13.0 onnx==1.23.0"),
        ("onnx.helper", "pip install torch==2.13.0 onnx==1.23.0"),
        ("coremltools", "pip install coremltools==9.0"),
        ("torchao", "pip install 'torchao<0.19,>=0.18'"),
        ("numpy", None),
        ("nonsense", None),
        ("turbopocket.nothing", None),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_brings_it(
    turbopocket: Run, monkeypatch: pytest.MonkeyPatch, module: str, hint: str | None
) -> None:
    monkeypatch.setattr(extras.metadata, "requires", lambda _: REQUIREMENTS)

    def rows() -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(listings, "format_rows", rows)
    ran = turbopocket("formats")
    if hint is None:
        assert ran.code == 70
    else:
        assert ran.code == 1
        top = module.partition(".")[0]
        assert ran.err == f"error: this needs {top}, which is not installed here\nhint: {hint}\n"
