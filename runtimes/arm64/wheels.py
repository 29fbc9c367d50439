# SPDX-License-Identifier: Apache-2.0
"""aarch64 wheels, fetched by this Python's own pip from wherever it is configured to."""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ...ground.errors import TurbopocketError
from ..command import run

_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)] + ["manylinux2014_aarch64"]


def download_wheels(requirements: Sequence[str], python: str, into: Path) -> None:
    """Fetches exactly these wheels for CPython `python` (such as 3.11); what they depend on is not fetched."""
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [option for platform in _PLATFORMS for option in ("--platform", platform)]
    command += ["--implementation", "cp", "--python-version", python, "--abi", f"cp{python.replace('.', '')}"]
    command += ["--dest", str(into), *requirements]
    try:
        run(command, "pip download")
    except TurbopocketError as error:
        raise TurbopocketError(f"aarch64 wheels of {', '.join(requirements)}: {error}") from error


def unpack_wheel(wheel: Path, into: Path, only: tuple[str, ...] = ("",)) -> None:
    """Unpacks the files whose paths begin with one of `only`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into, [name for name in archive.namelist() if name.startswith(only)])
