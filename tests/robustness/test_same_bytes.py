# SPDX-License-Identifier: Apache-2.0
"""A request has one answer: the same bytes whatever the process, the machine's settings and the places are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ("--formats", "int8-g32,int4-g32,fp16", "--budget", "1000kB", "--steps", "2", "--guidance", "1")
SET = ("--set", "calibrate.pictures=1", "--set", "parity.pictures=1")
COMMAND = "import os, sys; os.umask(int(sys.argv.pop(1), 8)); from turbopocket.cli import main; main()"


def built(model: Path, folder: Path, *options: str, umask: str = "022", **environment: str) -> dict[str, bytes]:
    """The files of an artifact that a fresh process built in `folder`."""
    shutil.copytree(model, folder / "model")
    asked = ("build", "model", "--out", "art", *SHORT, *SET, *options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"} | environment
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, umask, *asked], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    art = folder / "art"
    return {path.relative_to(art).as_posix(): path.read_bytes() for path in sorted(art.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_hash_seed_path_locale_umask_and_workers_leave_the_bytes_as_they_are(tiny_sd: Path, tmp_path: Path) -> None:
    expected = built(tiny_sd, tmp_path / "a")
    assert len(expected) > 5
    elsewhere = tmp_path / "another" / "and longer path"
    other = {"PYTHONHASHSEED": "12345", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}
    assert built(tiny_sd, elsewhere, umask="077", **other) == expected
    require_same_but_measured(built(tiny_sd, tmp_path / "b", "--workers", "2"), expected)


def require_same_but_measured(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """All files are equal; of the manifest, what PyTorch measured while it ran may differ in its last digits."""
    ours, theirs = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected
    for manifest in (ours, theirs):
        manifest["measured"] = {**manifest["parity"].pop("compression"), "loss": manifest["plan"].pop("predicted_loss")}
    assert ours.pop("measured") == pytest.approx(theirs.pop("measured"), rel=1e-4)
    assert ours == theirs


@pytest.mark.slow
def test_threads_leave_the_bytes_as_they_are(tiny_sd: Path, tmp_path: Path) -> None:
    one, two = (built(tiny_sd, tmp_path / count, OMP_NUM_THREADS=count) for count in "12")
    assert [name for name in one if one[name] != two.get(name)] == []
