# SPDX-License-Identifier: Apache-2.0
"""Debian packages in a folder of ours: fetched from the machine's own sources, unpacked, never installed.

apt works on a private state in which nothing is installed, so it needs no root and leaves the system's database alone.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ground.errors import TurbopocketError
from ..command import run

_CONFIG = """\
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
APT::Architecture "{native}";
APT::Architectures {{ {architectures} }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "{archives}";
Dir::Log "{folder}/log";
"""
_URI = re.compile(r"^'[^']+' (\S+) (\d+) ", re.MULTILINE)


@dataclass(frozen=True)
class PrivateApt:
    """apt with its state in `folder` and its packages in `archives`, by architecture."""

    folder: Path
    archives: Path

    def update(self, architectures: Sequence[str]) -> None:
        """Fetches the lists of what there is."""
        for needed in ("state/lists/partial", "cache", "log"):
            (self.folder / needed).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        self._get(architectures[0], ["update"], architectures)

    def needed(self, architecture: str, packages: Sequence[str]) -> dict[str, int]:
        """Bytes by file name of the packages and all they depend on, as a download would bring them."""
        listed = self._get(architecture, ["install", "--print-uris", "--yes", *packages])
        return {name: int(size) for name, size in _URI.findall(listed)}

    def download(self, architecture: str, packages: Sequence[str]) -> None:
        """Fetches them into `archives`, going on where an interrupted run was; apt checks the signed hashes."""
        self._get(architecture, ["install", "--download-only", "--yes", *packages])

    def path(self, architecture: str, name: str) -> Path:
        """Where a package of `needed` is after `download`."""
        return self.archives / architecture / name

    def _get(self, architecture: str, arguments: Sequence[str], architectures: Sequence[str] | None = None) -> str:
        quoted = " ".join(f'"{name}";' for name in architectures or [architecture])
        archives = self.archives / architecture
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        config = self.folder / f"{architecture}.conf"
        values = {"native": architecture, "architectures": quoted, "folder": self.folder, "archives": archives}
        config.write_text(_CONFIG.format(**values))
        return run([*_tool("apt-get"), "--config-file", str(config), "--quiet", *arguments], f"apt-get {arguments[0]}")


def unpack(archive: Path, into: Path, leave_out: Sequence[str]) -> None:
    """Unpacks a package's files, except those matching tar's patterns `leave_out`."""
    into.mkdir(parents=True, exist_ok=True)
    exclude = [f"--exclude={pattern}" for pattern in leave_out]
    with subprocess.Popen([*_tool("dpkg-deb"), "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as unpacking:
        command = ["tar", "--extract", "--no-same-owner", *exclude, "--directory", str(into)]
        done = subprocess.run(command, stdin=unpacking.stdout, capture_output=True, text=True, check=False)
    if unpacking.returncode != 0 or done.returncode != 0:
        raise TurbopocketError(f"{archive} can not be unpacked: {done.stderr.strip() or 'it is damaged'}")


def _tool(name: str) -> list[str]:
    path = shutil.which(name)
    if path is None:
        raise TurbopocketError(
            f"{name} is not there; the emulator and the ARM libraries are fetched through it",
            hint="run this on Debian or Ubuntu, where it is part of the system",
        )
    return [path]
