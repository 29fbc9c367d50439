# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from turbopocket.export.staging import refuse_occupied, staged_folders, write_atomically
from turbopocket.runtimes.errors import TurbopocketError


def test_folders_appear_together_when_the_work_is_done(tmp_path: Path) -> None:
    finals = (tmp_path / "deep" / "a", tmp_path / "deep" / "a.report")
    with staged_folders(finals) as (first, second):
        (first / "x").write_text("1")
        (second / "y").write_text("2")
        assert not finals[0].exists()
    assert (finals[0] / "x").read_text() == "1"
    assert (finals[1] / "y").read_text() == "2"
    assert sorted(path.name for path in finals[0].parent.iterdir()) == ["a", "a.report"]


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "a"
    final.mkdir()
    (final / "old").write_text("kept")
    with pytest.raises(RuntimeError, match="halfway"), staged_folders((final,)) as (stage,):
        (stage / "new").write_text("lost")
        raise RuntimeError("halfway")
    assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_success_replaces_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "a"
    final.mkdir()
    (final / "old").write_text("gone")
    with staged_folders((final,)) as (stage,):
        (stage / "new").write_text("here")
    assert [path.name for path in final.iterdir()] == ["new"]


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(TurbopocketError, match="can not write .*: No space left on device"),
        staged_folders((tmp_path / "a",)),
    ):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_place_that_takes_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TurbopocketError, match="can not write .*(Not a directory|File exists)"),
        staged_folders((tmp_path / "file" / "a",)),
    ):
        pass


def test_occupied_output_needs_overwrite_and_only_artifacts_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_occupied(out, overwrite=False)
    out.mkdir()
    refuse_occupied(out, overwrite=False)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(TurbopocketError, match="is not empty"):
        refuse_occupied(out, overwrite=False)
    with pytest.raises(TurbopocketError, match="has no manifest.json, so it is not an artifact"):
        refuse_occupied(out, overwrite=True)
    (out / "manifest.json").write_text("{}")
    refuse_occupied(out, overwrite=True)
    with pytest.raises(TurbopocketError, match="is a file"):
        refuse_occupied(out / "thesis.txt", overwrite=True)


def test_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TurbopocketError, match="can not write"):
        write_atomically(tmp_path / "none" / "picture.png", b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


KILLED = """
import os, signal, sys
from pathlib import Path
from turbopocket.export.staging import staged_folders
with staged_folders((Path(sys.argv[1]),)) as (stage,):
    (stage / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_and_what_a_running_one_makes_stays(tmp_path: Path) -> None:
    final = tmp_path / "art"
    done = subprocess.run([sys.executable, "-c", KILLED, str(final)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".art.*/art/half"))) == 1
    with staged_folders((final,)) as (running,):
        assert not list(tmp_path.glob(".art.*/art/half"))
        with staged_folders((final,)) as (second,):
            (second / "file").write_text("second")
        assert running.is_dir()
    assert list(tmp_path.glob(".art.*")) == []
