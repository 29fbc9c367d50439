# SPDX-License-Identifier: Apache-2.0
"""A single file is written whole or not at all, and never over what is no plain file."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from turbopocket.export.output import staging
from turbopocket.export.output.staging import (
    refuse_file,
    write_atomically,
)
from turbopocket.ground.errors import TurbopocketError

from .test_staging import names


def test_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TurbopocketError, match="can not write"):
        write_atomically(path / "picture.png", b"new")
    assert names(tmp_path) == ["picture.png"]


def test_a_file_is_readable_by_whom_the_users_mask_says(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "picture.png", b"new")
    finally:
        os.umask(mask)
    assert (tmp_path / "picture.png").stat().st_mode & 0o777 == 0o640


def symlink(path: Path) -> None:
    path.symlink_to(path.with_name("target"))
    path.with_name("target").write_text("precious")


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("void"))


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


IN_THE_WAY: dict[str, tuple[Callable[[Path], None], str]] = {
    "symlink": (symlink, "is a symlink"),
    "dangling symlink": (dangling, "is a symlink"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (os.mkfifo, "is a pipe"),
    "socket": (listening, "is a socket"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_nothing_but_a_plain_file_is_written_over(
    kind: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may be no longer than 107 bytes
    path, (put, message) = tmp_path / "out.png", IN_THE_WAY[kind]
    put(path)
    before = path.lstat()
    for attempt in (lambda: refuse_file(path, overwrite), lambda: write_atomically(path, b"new", overwrite)):
        with pytest.raises(TurbopocketError, match=message):
            attempt()
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not (tmp_path / "target").exists() or (tmp_path / "target").read_text() == "precious"


def test_a_device_is_no_place_for_a_file() -> None:
    with pytest.raises(TurbopocketError, match="output /dev/null is a device"):
        refuse_file(Path("/dev/null"), overwrite=True)


def test_a_plain_file_needs_overwrite_also_when_it_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    refuse_file(path, overwrite=False)
    path.write_text("precious")
    for attempt in (lambda: refuse_file(path, False), lambda: write_atomically(path, b"new", False)):
        with pytest.raises(TurbopocketError, match="exists") as raised:
            attempt()
        assert raised.value.hint == "give another file, or --overwrite"
    monkeypatch.setattr(staging, "_refuse_in_the_way", lambda path, overwrite: None)  # as if a moment later
    with pytest.raises(TurbopocketError, match="File exists"):
        write_atomically(path, b"new", overwrite=False)
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["out.png"]


@pytest.mark.parametrize(
    ("place", "message"),
    [("file/out.png", "Not a directory"), ("nowhere/out.png", "No such file"), ("a" * 300, "File name too long")],
)
def test_a_place_that_takes_no_file_is_known_beforehand(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    dangling(tmp_path / "nowhere")
    with pytest.raises(TurbopocketError, match=f"can not write .*{message}"):
        refuse_file(tmp_path / place, overwrite=True)


def test_a_file_system_that_takes_no_file_is_known_beforehand() -> None:
    with pytest.raises(TurbopocketError, match="can not write /proc/out.png"):
        refuse_file(Path("/proc/out.png"), overwrite=True)


def test_asking_beforehand_leaves_nothing(tmp_path: Path) -> None:
    refuse_file(tmp_path / "new" / "folder" / "out.png", overwrite=False)
    assert names(tmp_path) == []
    write_atomically(tmp_path / "new" / "folder" / "out.png", b"new", overwrite=False)
    assert names(tmp_path / "new" / "folder") == ["out.png"]
    (tmp_path / "link").symlink_to("new")
    refuse_file(tmp_path / "link" / "out.png", overwrite=False)
