# SPDX-License-Identifier: Apache-2.0
"""Setting up the emulated CPU: what was fetched is kept, checked and not fetched again; what is missing is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.arm64 import setup
from turbopocket.runtimes.arm64.cpus import CPUS, parse_cpu
from turbopocket.runtimes.manifest import FileEntry, sha256_of


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of two packages that looks complete."""
    entries = []
    for name in ("debs/amd64/a_1_amd64.deb", "wheels/cp311/b-1.whl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
        entries.append(FileEntry(path=name, bytes=len(name), sha256=sha256_of(path)).model_dump())
    (tmp_path / "fetched.json").write_text(json.dumps({"request": setup._request(), "files": entries}))
    (tmp_path / "ready.json").write_text(json.dumps(setup._request()))
    (tmp_path / ".lock").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", ["thesis.txt", "trees/oak.jpg", "trees.partial/oak.jpg", ".hidden"])
@pytest.mark.parametrize("of_ours", [False, True])
def test_a_folder_with_files_of_the_users_is_no_cache(name: str, of_ours: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    if of_ours:
        (tmp_path / ".lock").write_text("")
        (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(TurbopocketError, match="which `arm64 setup` did not make") as refused:
        setup.prepare(tmp_path, print)
    assert refused.value.hint == "--cache DIR: a new or empty folder"
    assert (tmp_path / name).read_text() == "precious"


def refuse(*_: Any) -> Any:
    raise AssertionError("nothing is to be fetched or unpacked")


def test_complete_cache_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_fetch", refuse)
    monkeypatch.setattr(setup, "plant", refuse)
    found = setup.prepare(cache, print)
    assert (found["fetched"], len(found["files"])) == (0, 2)


def test_interrupted_unpacking_goes_on_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "ready.json").unlink()
    planted: list[Any] = []
    monkeypatch.setattr(setup, "_fetch", refuse)
    monkeypatch.setattr(setup, "plant", lambda *asked: planted.append(asked))
    setup.prepare(cache, print)
    assert planted == [(cache, ["debs/amd64/a_1_amd64.deb", "wheels/cp311/b-1.whl"])]
    assert setup.open_emulator(cache).trees == cache / "trees"


def test_damaged_download_is_named_and_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = cache / "wheels/cp311/b-1.whl"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    good = FileEntry(path="debs/amd64/a_1_amd64.deb", bytes=1, sha256="0" * 64)
    said: list[str] = []
    monkeypatch.setattr(setup, "_fetch", lambda *_: [good])
    monkeypatch.setattr(setup, "plant", lambda *_: None)
    assert setup.prepare(cache, said.append)["fetched"] == 1
    assert said[0] == "wheels/cp311/b-1.whl is not what was fetched: it will be fetched again"
    assert not damaged.exists()


def test_cache_for_other_versions_is_not_used(cache: Path) -> None:
    request = setup._request()
    request["wheels"]["onnxruntime"] = "1.0.0"
    (cache / "ready.json").write_text(json.dumps(request))
    with pytest.raises(TurbopocketError, match="was set up for other versions") as refused:
        setup.open_emulator(cache)
    assert refused.value.hint == "turbopocket arm64 setup"


def test_missing_registry_tool_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(TurbopocketError, match="apt-get is not there; the emulator and the ARM libraries"):
        setup.prepare(tmp_path, print)
    assert not (tmp_path / "ready.json").exists()


def test_other_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(TurbopocketError, match="needs x86-64 Linux, this is Linux riscv64"):
        setup.prepare(tmp_path, print)


def test_cache_lies_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert setup.default_cache() == tmp_path / "turbopocket" / "arm64"


def test_cpu_is_known_by_its_name() -> None:
    assert [parse_cpu(f"arm64:{cpu.name}") for cpu in CPUS] == list(CPUS)
    with pytest.raises(TurbopocketError, match="`cortex-a76` is not an emulated CPU: known are arm64:cortex-a53, "):
        parse_cpu("cortex-a76")
