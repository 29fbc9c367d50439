# SPDX-License-Identifier: Apache-2.0
"""The emulator and the ARM libraries as `setup` left them, and how a program is started on one of the CPUs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cpus import Cpu

_HOST_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_LOADER = "ld-linux-x86-64.so.2"
_PYTHON = re.compile(r"python3\.\d+")


@dataclass(frozen=True)
class Emulator:
    """What lies in `trees`: `host` (emulator, cross compiler), `sysroot`, `site` (wheels), `executorch`, `cpus`."""

    trees: Path

    @property
    def python(self) -> Path:
        """The ARM Python."""
        programs = (self.trees / "sysroot" / "usr" / "bin").glob("python3.*")
        return next(path for path in sorted(programs) if _PYTHON.fullmatch(path.name))

    @property
    def site(self) -> Path:
        """The folder of ARM Python packages."""
        return self.trees / "site"

    def command(
        self, cpu: Cpu, program: Path, *arguments: str, environment: Mapping[str, str], log: Path | None = None
    ) -> list[str]:
        """What starts an ARM program; every instruction that was translated to run goes into `log`."""
        qemu = [str(self.trees / "host/usr/bin/qemu-aarch64"), "-cpu", cpu.emulated]
        qemu += ["-L", str(self.trees / "cpus" / cpu.name)]
        if log is not None:
            qemu += ["-d", "in_asm", "-D", str(log)]
        for name, value in environment.items():
            qemu += ["-E", f"{name}={value}"]
        return [*self.host_loader(), *qemu, str(program), *arguments]

    def host_libraries(self) -> list[Path]:
        """Folders of the libraries of `host`."""
        return [self.trees / "host" / folder for folder in _HOST_LIBRARIES]

    def host_loader(self) -> list[str]:
        """What programs of `host` are started through, so that they find libraries of their own release."""
        folders = self.host_libraries()
        loader = next(path for folder in folders if (path := folder / _LOADER).exists())
        return [str(loader), "--library-path", ":".join(map(str, folders))]
