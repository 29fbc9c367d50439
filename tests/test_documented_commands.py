# SPDX-License-Identifier: Apache-2.0
"""Every command that a page shows is one that the command line takes, with what it takes; the main ones are run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Ran
from .export.published_sdxl import write_configs

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"```sh\n(.*?)```", flags=re.DOTALL)
VERBS = (
    "export.request.refuse_recipe",
    "export.request.open_emulators",
    "export.distill.run.refuse_recipe",
    "export.build.journal.clean",
    "export.artifact.Artifact.open",
    "export.report.rewrite.rewrite_report",
    "runtimes.arm64.setup.prepare",
)
"""What a command comes to once its arguments, recipe and settings are found right: then it looks for what they name."""


def shown(page: Path) -> list[str]:
    """The commands in the page's shell blocks, without comments."""
    lines = "".join(BLOCK.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) and line for line in lines if line.strip()]


COMMANDS = [(page.name, line) for page in PAGES for line in shown(page) if line.startswith("turbopocket ")]
MAKE = [
    (page.name, name)
    for page in PAGES
    for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), flags=re.MULTILINE)
]


class Reached(BaseException):
    """A verb was called: its request was understood."""


def test_pages_show_commands() -> None:
    assert len(COMMANDS) > 20
    assert len(MAKE) > 10


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_shown_command_is_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turbopocket: Callable[..., Ran]
) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.chdir(tmp_path)
    for verb in VERBS:
        monkeypatch.setattr(f"turbopocket.{verb}", reached)
    _, verb, *arguments = shlex.split(line, comments=True)
    try:
        ran = turbopocket(verb, *arguments)
    except Reached:
        return
    assert verb in ("formats", "models", "recipe"), line
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(("page", "name"), sorted(set(MAKE)))
def test_a_shown_make_target_is_one(page: str, name: str) -> None:
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert name in {each for line in targets for each in line.split()}


@pytest.mark.slow
def test_the_shown_budget_of_the_published_configs_is_one_that_fits_as_do_the_shown_phones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turbopocket: Callable[..., Ran]
) -> None:
    write_configs(tmp_path / "my-sdxl-configs")
    monkeypatch.chdir(tmp_path)
    for line in [line for _, line in COMMANDS if "my-sdxl-configs" in line]:
        ran = turbopocket(*shlex.split(line, comments=True)[1:])
        assert ran.code == 0, (line, ran.err)


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_order_in_a_clean_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turbopocket: Callable[..., Ran]
) -> None:
    """From the first build to the listings, as README shows them after `What it does`."""
    block = next(block for block in BLOCK.findall((ROOT / "README.md").read_text()) if "turbopocket formats" in block)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        ran = turbopocket(*shlex.split(line, comments=True)[1:])
        assert ran.code == 0, (line, ran.err)
    assert (tmp_path / "demo.png").is_file()
    assert (tmp_path / "build" / "demo.report" / "report.html").is_file()
