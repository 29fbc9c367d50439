# SPDX-License-Identifier: Apache-2.0
"""The C++ runner, built with CMake when it is first needed, for this machine or for the emulated ARM CPU."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....ground.errors import TurbopocketError
from ....ground.extras import install_hint
from ...arm64.emulator import Emulator
from ...cache import cache_folder
from ...command import run

SOURCES = Path(__file__).parent
KERNELS = SOURCES.parents[1] / "kernels"
PROGRAM = "executorch_runner"
_SOURCE_SUFFIXES = (".cpp", ".h", ".txt")


@dataclass(frozen=True)
class Toolchain:
    """What to build with: the executorch package of the CPU built for, CMake's options, and the environment."""

    executorch: Path
    options: tuple[str, ...]
    environment: Mapping[str, str]


def native_runner() -> Path:
    """The runner for this machine, built if it is not there. Raises TurbopocketError when something is missing."""
    found = importlib.util.find_spec("executorch")
    folders = list(found.submodule_search_locations or ()) if found else []
    package = next((Path(folder) for folder in folders if (Path(folder) / "lib").is_dir()), None)
    if package is None:
        raise TurbopocketError("the package executorch is not installed", hint=install_hint("executorch"))
    return _built(Toolchain(package, (), os.environ))


def arm64_runner(emulator: Emulator) -> Path:
    """The runner for ARM, built if it is not there with the compiler that `arm64 setup` brought."""
    host = emulator.trees / "host"
    compiler = host / "usr" / "bin" / "aarch64-linux-gnu-g++"
    options = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_SYSROOT={host}",
    )
    # The unpacked compiler's libraries and its assembler lie beside it.
    libraries = ":".join(map(str, emulator.host_libraries()))
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": f"{compiler.parent}:{os.environ['PATH']}"}
    return _built(Toolchain(emulator.trees / "executorch", options, environment))


def _built(toolchain: Toolchain) -> Path:
    """The program in a cache folder of its own for these sources, this package and these options."""
    folder = cache_folder("executorch_runner") / _key(toolchain)
    program = folder / PROGRAM
    if program.is_file():
        return program
    cmake = shutil.which("cmake")
    if cmake is None:
        raise TurbopocketError(
            "the ExecuTorch runner is built with cmake, which is not there",
            hint="install cmake, make and g++ with the system's package manager",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        asked = [cmake, "-S", str(SOURCES), "-B", scratch, f"-DEXECUTORCH={toolchain.executorch}", *toolchain.options]
        run(asked, "cmake", toolchain.environment)
        run([cmake, "--build", scratch], "cmake --build", toolchain.environment)
        folder.mkdir(exist_ok=True)
        (Path(scratch) / PROGRAM).replace(program)
    return program


def _key(toolchain: Toolchain) -> str:
    digest = hashlib.sha256(repr((str(toolchain.executorch), toolchain.options)).encode())
    library = (toolchain.executorch / "lib" / "libexecutorch.so").stat()
    digest.update(repr((library.st_size, library.st_mtime_ns)).encode())
    folders = SOURCES, KERNELS, KERNELS / "core", KERNELS / "executorch"
    for source in [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in _SOURCE_SUFFIXES]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
