# SPDX-License-Identifier: Apache-2.0
"""The C++ sources of this tree, built once per change of theirs; without compiler or CMake these tests are skipped."""

import shutil
import subprocess
from pathlib import Path

import pytest

from turbopocket.runtimes.kernels.core_library import CoreLibrary

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "kernels" / "tests"


@pytest.fixture(scope="session")
def cmake_build() -> Path:
    """The configured build folder for `build_target`; kept, so that only what changed is compiled again."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler: the kernels cannot be built here")
    sources = ROOT / "runtimes" / "kernels"
    subprocess.run(["cmake", "-S", str(sources), "-B", str(BUILD)], check=True, capture_output=True)
    return BUILD


@pytest.fixture(scope="session")
def core(cmake_build: Path) -> CoreLibrary:
    done = subprocess.run(
        ["cmake", "--build", str(cmake_build), "--target", "codebook"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return CoreLibrary(cmake_build / "libcodebook.so")
