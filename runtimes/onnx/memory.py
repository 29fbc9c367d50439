# SPDX-License-Identifier: Apache-2.0
"""Memory that one component takes in ONNX Runtime, measured in a process in which nothing else lives."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from ...ground.errors import TurbopocketError
from ..manifest import load_manifest
from ..memory import MemoryFigures, component_bytes, zero_inputs
from ..runner import component_spec
from .session import open_session

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/smaps")


_TIMEOUT_SECONDS = 900


def measure(folder: Path, component: str, threads: int = 1) -> MemoryFigures:
    """The memory of one component, opened as `OnnxRunner` opens it and run once on zeros, in a fresh Python.

    It runs for one picture of the artifact's largest size. Raises TurbopocketError when the system has no
    /proc/self/status, when there is no such component, or when the run fails.
    """
    spec = component_spec(load_manifest(folder), component)
    if not _STATUS.is_file():
        raise TurbopocketError(f"memory of {component} cannot be measured: this system has no {_STATUS}")
    if not (folder / spec.file).is_file():
        raise TurbopocketError(f"{component}: {folder / spec.file} is missing")
    command = [sys.executable, "-m", __name__, str(folder), component, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TurbopocketError(f"{component}: no result of one run after {_TIMEOUT_SECONDS} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise TurbopocketError(f"{component}: the measuring process ended with {done.returncode}: {reason}")
    return MemoryFigures(**json.loads(done.stdout))


def resident_bytes() -> dict[str, int]:
    """This process's RssAnon, RssFile and VmHWM (largest resident set so far), in bytes."""
    wanted = ("RssAnon", "RssFile", "VmHWM")
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    if missing := [name for name in wanted if name not in fields]:
        raise TurbopocketError(f"{_STATUS} has no {', '.join(missing)}: Linux 4.5 or newer is needed")
    return {name: int(fields[name].split()[0]) * 1024 for name in wanted}


def mapped_bytes(folder: Path) -> int:
    """Bytes in memory of this process's pages of files in a folder."""
    own, total = False, 0
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        name, *words = line.split(maxsplit=5)
        if not name.endswith(":"):  # "7f00-7f10 r--p 00000000 08:01 123 /path" begins a mapping
            own = len(words) == 5 and Path(words[4]).is_relative_to(folder.resolve())
        elif own and name == "Rss:":
            total += int(words[0]) * 1024
    return total


def _measure_here(folder: Path, component: str, threads: int) -> MemoryFigures:
    """The figures of this very process, which must not have opened anything yet."""
    manifest = load_manifest(folder)
    spec = component_spec(manifest, component)
    inputs = zero_inputs(spec, manifest.image.at(manifest.largest_size))
    start = resident_bytes()
    session = open_session(str(folder / spec.file), threads)
    loaded = resident_bytes()
    session.run(None, inputs)
    ran, mapped = resident_bytes(), mapped_bytes(folder)
    if "torch" in sys.modules:
        raise TurbopocketError("PyTorch was imported, its memory would be counted with the component's")
    return MemoryFigures(
        start_anon_bytes=start["RssAnon"],
        loaded_anon_bytes=loaded["RssAnon"],
        ran_anon_bytes=ran["RssAnon"],
        start_file_bytes=start["RssFile"],
        loaded_file_bytes=loaded["RssFile"],
        ran_file_bytes=ran["RssFile"],
        mapped_bytes=mapped,
        peak_bytes=ran["VmHWM"],
        weight_bytes=component_bytes(folder, manifest, component),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
