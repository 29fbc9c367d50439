# SPDX-License-Identifier: Apache-2.0
"""How a command ends when something goes wrong: one sentence, and a bug's traceback for who asks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket import door
from turbopocket.export import listings
from turbopocket.export.output.staging import claimed
from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.reading import one_sentence, parse_json, read_text

Run = Callable[..., Any]


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """`formats` divides by zero."""

    def rows() -> Any:
        return 1 / 0

    monkeypatch.setattr(listings, "format_rows", rows)


@pytest.mark.usefixtures("bug")
def test_a_bug_is_one_sentence_that_says_how_to_report_it(turbopocket: Run) -> None:
    ran = turbopocket("formats")
    assert ran.code == door.BUG
    first, second = ran.err.splitlines()
    assert first.startswith("error: a bug of turbopocket: ZeroDivisionError: division by zero (test_door.py:")
    assert "-v" in second


@pytest.mark.usefixtures("bug")
def test_a_bug_has_its_traceback_for_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbopocket.cli import main

    monkeypatch.setattr("sys.argv", ["turbopocket", "-v", "formats"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_brackets_in_a_path_are_no_markup(turbopocket: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "[x]" / "[" / "y].png"
    ran = turbopocket("generate", artifact, "a red circle", "--steps", 1, "--out", out)
    assert (ran.code, ran.out.strip()) == (0, str(out)), ran.err


def test_what_a_library_raises_is_one_sentence_and_what_stops_a_program_is_none() -> None:
    with pytest.raises(TurbopocketError, match=r"^a\.json is odd: there is no 'key'$"), one_sentence("a.json is odd"):
        raise KeyError("key")
    with pytest.raises(TurbopocketError, match="^x: "), one_sentence("x"):
        raise type("PanicException", (BaseException,), {})("index out of range")
    with pytest.raises(KeyboardInterrupt), one_sentence("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "\ufeff{}"])
def test_absurd_json_is_one_sentence(text: str) -> None:
    with pytest.raises(TurbopocketError, match="^it is not JSON: "):
        parse_json(text, "it")


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is not a plain file"),
        (Path("/dev/zero"), "is not a plain file"),
        (tmp_path / "none", "does not exist"),
        (Path("a\0b"), "is no path: it holds a NUL"),
    ):
        with pytest.raises(TurbopocketError, match=message):
            read_text(path)
    (tmp_path / "large").write_bytes(b"xx")
    with pytest.raises(TurbopocketError, match="has 2 bytes; at most 1 are read"):
        read_text(tmp_path / "large", most_bytes=1)


def test_an_error_elsewhere_in_a_build_is_not_called_an_output_that_can_not_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), claimed(out, lambda: None) as claim, claim.staged(out):
        (tmp_path / "model").open()
    with (
        pytest.raises(TurbopocketError, match=f"can not write {out}"),
        claimed(out, lambda: None) as claim,
        claim.staged(out) as (made,),
    ):
        (made / "no folder" / "file").open("w")
