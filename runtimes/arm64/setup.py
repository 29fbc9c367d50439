# SPDX-License-Identifier: Apache-2.0
"""An emulated ARM Linux in one folder: emulator, ARM libraries, ARM wheels and a cross compiler, from the registries.

Everything is fetched once, hashed and kept, so that a second run needs no network and a damaged folder is repaired.
"""

import fcntl
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...ground.errors import TurbopocketError
from ..cache import cache_folder
from ..manifest import FileEntry, sha256_of
from .apt import PrivateApt
from .emulator import Emulator
from .trees import GUEST, HOST, plant
from .wheels import download_wheels

READY, FETCHED = "ready.json", "fetched.json"
"""What the trees were made for, written last; every file that was fetched."""
LOCK = ".lock"
"""The first file in the folder, by which it is known for ours."""
_NAMES = (LOCK, "apt", "debs", "wheels", "trees", "trees.partial", READY, FETCHED, f".{READY}", f".{FETCHED}")
LAYOUT = 1
"""Counts up when the folder's layout changes."""
EXECUTORCH = "1.5.1"
_DEBS: Mapping[str, tuple[str, ...]] = {
    HOST: ("qemu-user", "g++-aarch64-linux-gnu"),
    GUEST: ("python3", "libstdc++6", "libgomp1"),
}
_PYTHON_DEB = re.compile(r"python(3\.\d+)-minimal_")

Tell = Callable[[str], None]


def prepare(cache: Path, tell: Tell) -> dict[str, Any]:
    """The emulator set up in `cache`; returns what was fetched, and the bytes that are there now.

    Goes on where an interrupted run was. Raises TurbopocketError when apt, dpkg or pip are missing or fail, and for a
    machine that is not x86-64 Linux.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found = f"{platform.system()} {platform.machine()}"
        raise TurbopocketError(f"the emulated ARM CPU needs x86-64 Linux, this is {found}")
    cache = cache.expanduser().absolute()
    _refuse_foreign(cache)
    with _locked(cache):
        entries = _recorded(cache)
        fetched = [] if entries is not None and _intact(cache, entries, tell) else _fetch(cache, tell)
        entries = fetched or entries or []
        if fetched or not (cache / READY).is_file():
            (cache / READY).unlink(missing_ok=True)
            tell("unpacking, and starting ONNX Runtime on the emulated CPU")
            plant(cache, [entry.path for entry in entries])
            _write(cache / READY, _request())
    total = sum(entry.bytes for entry in entries)
    tell(f"{len(entries)} packages, {total / 1e6:.1f} MB, are in {cache}")
    files = [entry.model_dump() for entry in entries]
    return {"cache": str(cache), "fetched": len(fetched), "download_bytes": total, "files": files}


def default_cache() -> Path:
    """Where the emulator lies unless told otherwise."""
    return cache_folder("arm64")


def open_emulator(cache: Path) -> Emulator:
    """The emulator that `prepare` left in `cache`. Raises TurbopocketError when it did not, or for other versions."""
    hint = "turbopocket arm64 setup"
    try:
        found = json.loads((cache / READY).read_text())
    except (OSError, ValueError):
        raise TurbopocketError(f"{cache} holds no emulated ARM CPU", hint) from None
    if found != _request():
        raise TurbopocketError(f"the emulated ARM CPU in {cache} was set up for other versions: {found}", hint)
    return Emulator(cache / "trees")


def _request() -> dict[str, Any]:
    wheels = {name: metadata.version(name) for name in ("onnxruntime", "numpy")}
    debs = {architecture: list(packages) for architecture, packages in _DEBS.items()}
    return {"layout": LAYOUT, "debs": debs, "wheels": wheels, "executorch": EXECUTORCH}


def _refuse_foreign(cache: Path) -> None:
    """Raises TurbopocketError for a folder with something in it that `prepare` did not make: it removes whole trees."""
    try:
        names = sorted(path.name for path in cache.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise TurbopocketError(f"cache folder {cache} can not be read: {error.strerror}") from error
    strange = [name for name in names if name not in _NAMES] or ([] if LOCK in names else names)
    if strange:
        raise TurbopocketError(
            f"cache folder {cache} holds {strange[0]}, which `arm64 setup` did not make; the emulator needs a folder "
            "of its own",
            hint="--cache DIR: a new or empty folder",
        )


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One at a time: a second caller waits, and then finds everything there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / LOCK).open("w")
    except OSError as error:
        raise TurbopocketError(f"cache folder {cache} can not be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recorded(cache: Path) -> list[FileEntry] | None:
    """What an earlier run fetched for the same request, None when there was none."""
    try:
        record = json.loads((cache / FETCHED).read_text())
        return [FileEntry(**entry) for entry in record["files"]] if record["request"] == _request() else None
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def _intact(cache: Path, entries: list[FileEntry], tell: Tell) -> bool:
    """Whether every fetched file is as it was fetched; one that is not is removed, to be fetched again."""
    damaged = [entry.path for entry in entries if not _same(cache / entry.path, entry)]
    for path in damaged:
        tell(f"{path} is not what was fetched: it will be fetched again")
        (cache / path).unlink(missing_ok=True)
    return not damaged


def _same(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256


def _fetch(cache: Path, tell: Tell) -> list[FileEntry]:
    """Every package, downloaded and hashed, in the order of unpacking."""
    apt = PrivateApt(cache / "apt", cache / "debs")
    tell("apt: fetching the lists of packages (about 20 MB) into a private state")
    apt.update((HOST, GUEST))
    needed = {architecture: apt.needed(architecture, packages) for architecture, packages in _DEBS.items()}
    for architecture, sizes in needed.items():
        megabytes = sum(sizes.values()) / 1e6
        asked = ", ".join(_DEBS[architecture])
        tell(f"apt: {len(sizes)} {architecture} packages, {megabytes:.1f} MB: {asked} and what they need")
        apt.download(architecture, _DEBS[architecture])
    python = next(found[1] for name in needed[GUEST] if (found := _PYTHON_DEB.match(name)))
    request = _request()
    requirements = [f"{name}=={version}" for name, version in request["wheels"].items()]
    requirements.append(f"executorch=={EXECUTORCH}")
    wheels = cache / "wheels" / f"cp{python.replace('.', '')}"
    tell(f"pip: aarch64 wheels for Python {python}, about 55 MB: {', '.join(requirements)}")
    download_wheels(requirements, python, wheels)
    names = tuple(requirement.replace("==", "-") for requirement in requirements)
    paths = [apt.path(architecture, name) for architecture, sizes in needed.items() for name in sizes]
    paths += [path for path in sorted(wheels.glob("*.whl")) if path.name.startswith(names)]
    entries = [_entry(cache, path) for path in paths]
    values = {"request": request, "files": [entry.model_dump() for entry in entries]}
    _write(cache / FETCHED, values)
    return entries


def _entry(cache: Path, path: Path) -> FileEntry:
    return FileEntry(path=path.relative_to(cache).as_posix(), bytes=path.stat().st_size, sha256=sha256_of(path))


def _write(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
