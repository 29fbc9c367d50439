# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all, one command at a time, and take no place that is not theirs."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from turbopocket.export.output import replacing
from turbopocket.export.output.staging import (
    Busy,
    claimed,
    output_path,
    settle_output,
)
from turbopocket.ground.errors import TurbopocketError

from ..crash_states import killed_between


def anything() -> None:
    """Nothing is in the way."""


def make(*finals: Path, text: str = "new") -> None:
    """Makes folders that hold one file."""
    with claimed(finals[0], anything) as claim, claim.staged(*finals) as folders:
        for folder in folders:
            (folder / text).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_appear_together_when_the_work_is_done(tmp_path: Path) -> None:
    finals = (tmp_path / "deep" / "a", tmp_path / "deep" / "a.report")
    with claimed(finals[0], anything) as claim, claim.staged(*finals) as (first, second):
        (first / "x").write_text("1")
        (second / "y").write_text("2")
        assert not finals[0].exists()
    assert (finals[0] / "x").read_text() == "1"
    assert (finals[1] / "y").read_text() == "2"
    assert names(tmp_path / "deep") == ["a", "a.report"]


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "a", text="old")
    with (
        pytest.raises(RuntimeError, match="halfway"),
        claimed(tmp_path / "a", anything) as claim,
        claim.staged(tmp_path / "a") as (stage,),
    ):
        (stage / "new").write_text("lost")
        raise RuntimeError("halfway")
    assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"]


def test_failure_leaves_no_folder_that_was_made_for_the_output(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "a"
    with pytest.raises(RuntimeError), claimed(out, anything):
        raise RuntimeError
    assert names(tmp_path) == []


def test_success_replaces_the_old_folder(tmp_path: Path) -> None:
    make(tmp_path / "a", text="old")
    make(tmp_path / "a")
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(TurbopocketError, match="can not write .*: No space left on device"),
        claimed(tmp_path / "a", anything) as claim,
        claim.staged(tmp_path / "a"),
    ):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_place_that_takes_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TurbopocketError, match="can not write .*(Not a directory|File exists)"):
        make(tmp_path / "file" / "a")
    assert (tmp_path / "file").is_file()


def test_an_output_without_a_name_of_its_own_is_named_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert output_path(Path()) == tmp_path / "a" / "b"
    assert output_path(Path("..")) == tmp_path / "a"
    with pytest.raises(TurbopocketError, match="output / is the root"):
        output_path(Path("/"))


def test_what_came_into_the_way_while_the_output_was_made_is_kept(tmp_path: Path) -> None:
    def refuse() -> None:
        if (tmp_path / "a" / "thesis").exists():
            raise TurbopocketError("not ours")

    with (
        pytest.raises(TurbopocketError, match="not ours"),
        claimed(tmp_path / "a", refuse) as claim,
        claim.staged(tmp_path / "a"),
    ):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis").write_text("precious")
    assert (tmp_path / "a" / "thesis").read_text() == "precious"


@pytest.mark.parametrize("moment", ["report", "artifact"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")], ids=["ctrl_c", "disk"])
def test_a_replacement_that_is_interrupted_leaves_both_old_folders(
    moment: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = tmp_path / "a", tmp_path / "a.report"
    make(*finals, text="old")
    honest, calls = replacing.exchange, []

    def swap(one: Path, other: Path) -> bool:
        calls.append(other.name)
        if calls == {"report": ["a.report"], "artifact": ["a.report", "a"]}[moment]:
            raise error
        return honest(one, other)

    monkeypatch.setattr(replacing, "exchange", swap)
    with pytest.raises((KeyboardInterrupt, TurbopocketError)):
        make(*finals)
    assert [names(final) for final in finals] == [["old"], ["old"]]
    assert names(tmp_path) == ["a", "a.report"]


@pytest.mark.parametrize("swapping", [True, False])
def test_a_folder_that_can_not_go_back_is_kept_and_said_where(
    swapping: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals, hidden = (tmp_path / "a", tmp_path / "a.report"), tmp_path / ".a.turbopocket"
    make(*finals, text="old")
    if not swapping:
        monkeypatch.setattr(replacing, "exchange", lambda one, other: False)
    killed_between(finals)
    finals[1].rename(tmp_path / "elsewhere")
    finals[1].mkdir()
    (finals[1] / "thesis").write_text("precious")
    for _ in range(2):
        with pytest.raises(TurbopocketError, match=r"what it replaced lies in .*\.a\.turbopocket"):
            make(*finals)
    assert (finals[1] / "thesis").read_text() == "precious"
    assert [path.parent.name for path in hidden.rglob("old") if path.is_file()] == ["a.report"]
    assert names(finals[0]) == ["old"]


def test_folders_that_a_copy_gave_other_inodes_are_not_guessed_at(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = tmp_path / "a", tmp_path / "a.report"
    make(*finals, text="old")
    killed_between(finals)
    copy = Path(shutil.copytree(tmp_path, tmp_path_factory.mktemp("other") / "copy"))
    with pytest.raises(TurbopocketError, match="can not be told any more; what it replaced lies in"):
        settle_output(copy / "a")
    assert names(copy / "a") == ["old"]


def test_every_new_file_is_on_disk_before_an_old_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a", text="old")
    synced, honest = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), honest(file)))

    def swap(one: Path, other: Path) -> bool:
        assert {path.stat().st_ino for path in one.rglob("*")} <= synced
        return False

    monkeypatch.setattr(replacing, "exchange", swap)
    make(tmp_path / "a")
    assert names(tmp_path / "a") == ["new"]


HOLDER = """
import sys
from pathlib import Path
from turbopocket.export.output.staging import claimed
with claimed(Path(sys.argv[1]), lambda: None) as claim, claim.staged(Path(sys.argv[1])) as (stage,):
    (stage / "half").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_output_is_one_commands_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "art"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=rf"output .*/art is being made by another command \(process {holder.pid}\)"):
            make(out)
        assert len(list(tmp_path.glob(".art.*/new/art/half"))) == 1
        settle_output(out)
        make(tmp_path / "other")
        holder.kill()
    assert names(tmp_path) == [".art.turbopocket", "other"]
    make(out)
    assert names(tmp_path) == ["art", "other"]
    assert names(out) == ["new"]


def test_of_many_that_begin_together_one_at_a_time_holds_the_output(tmp_path: Path) -> None:
    holders, most, held = [], [], []

    def claim_often() -> None:
        for _ in range(60):
            with suppress(Busy), claimed(tmp_path / "deep" / "a", anything) as claim:
                holders.append(1)
                most.append(len(holders))
                assert claim.hidden.is_dir()
                holders.pop()
                held.append(1)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(claim_often) for _ in range(4)]:
            done.result()
    assert set(most) == {1}
    assert held
    assert not list(tmp_path.glob("deep/*"))


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, raced = fcntl.flock, []

    def flock(file: int, operation: int) -> None:
        if not raced:  # the last holder ends between the opening and the locking of its file
            raced.append(file)
            (tmp_path / ".a.turbopocket" / "lock").unlink()
            (tmp_path / ".a.turbopocket").rmdir()
        honest(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "a", anything), pytest.raises(Busy), claimed(tmp_path / "a", anything):
        pass
    assert raced


def test_without_locks_an_output_that_may_be_in_the_making_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "a", anything) as claim, claim.staged(tmp_path / "a"):
        with pytest.raises(TurbopocketError, match="may be in the making: .*No locks available") as raised:
            make(tmp_path / "a")
        assert raised.value.hint == "when none does, move what you need from that folder, and remove it"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["*", "[ab]", "a?", "**", "-x", "{a,b}"])
def test_a_name_is_a_name_and_no_pattern(name: str, tmp_path: Path) -> None:
    (tmp_path / ".precious.data").mkdir()
    (tmp_path / ".precious.data" / ".lock").write_text("")
    (tmp_path / ".a.turbopocket.backup").mkdir()
    (tmp_path / ".a.turbopocket.backup" / "lock").write_text("")
    abandoned = tmp_path / f".{name}.turbopocket"
    (abandoned / "new" / name).mkdir(parents=True)
    (abandoned / "lock").write_text("")
    make(tmp_path / name)
    assert names(tmp_path) == sorted([".precious.data", ".a.turbopocket.backup", name])


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
def test_a_foreign_thing_of_the_hidden_folders_name_is_left_alone(kind: str, tmp_path: Path) -> None:
    hidden, elsewhere = tmp_path / ".a.turbopocket", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        hidden.write_text("precious")
    elif kind == "symlink":
        hidden.symlink_to(elsewhere)
    else:
        hidden.mkdir()
        (hidden / "thesis").write_text("precious")
    with pytest.raises(TurbopocketError, match=r"\.a\.turbopocket is in the way"):
        make(tmp_path / "a")
    assert names(elsewhere) == []
    assert names(tmp_path) == [".a.turbopocket", "elsewhere"]
