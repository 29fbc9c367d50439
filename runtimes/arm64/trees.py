# SPDX-License-Identifier: Apache-2.0
"""What was fetched, unpacked: one folder of x86-64 programs, one of ARM libraries, and a root for each CPU."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..command import run
from .apt import unpack
from .cpus import CPUS, Cpu
from .emulator import Emulator
from .wheels import unpack_wheel

HOST, GUEST = "amd64", "arm64"
_TREES = {HOST: "host", GUEST: "sysroot"}
_LEFT_OUT = ("./usr/share/*", "./usr/bin/qemu-[!a]*", "*lto1", "*lto-dump*", "*san.a", "*san.so*")
_EXECUTORCH_PARTS = ("executorch/lib/", "executorch/include/")


def plant(cache: Path, packages: Sequence[str]) -> None:
    """Unpacks the packages (paths in `cache`) to `cache`/trees, complete or not at all.

    Starts the ARM Python once: that proves that all fits together, and compiles its modules. Raises TurbopocketError
    for a damaged package and when the start fails.
    """
    trees, staged = cache / "trees", cache / "trees.partial"
    for folder in (trees, staged):
        shutil.rmtree(folder, ignore_errors=True)
    for package in packages:
        path = cache / package
        if path.suffix == ".deb":
            unpack(path, staged / _TREES[path.parent.name], _LEFT_OUT)
        elif path.name.startswith("executorch-"):
            unpack_wheel(path, staged, _EXECUTORCH_PARTS)
        else:
            unpack_wheel(path, staged / "site")
    for cpu in CPUS:
        _make_root(staged, cpu)
    staged.rename(trees)
    emulator = Emulator(trees)
    program = emulator.command(
        CPUS[0],
        emulator.python,
        "-c",
        "import onnxruntime",
        environment={"PYTHONPATH": str(emulator.site), "ORT_DISABLE_TELEMETRY": "1"},
    )
    run(program, "the emulated Python", environment={})


def _make_root(trees: Path, cpu: Cpu) -> None:
    """The file system that programs on this CPU see first: the ARM libraries, and a /proc/cpuinfo of its own."""
    root = trees / "cpus" / cpu.name
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_text(cpu.cpuinfo)
    sysroot = trees / "sysroot"
    for name in sorted({entry.name for entry in sysroot.iterdir()} | {"lib"}):
        # Newer Debian releases have /lib as a link to /usr/lib, which is made at installation.
        inside = name if (sysroot / name).exists() else f"usr/{name}"
        (root / name).symlink_to(Path("../../sysroot") / inside)
