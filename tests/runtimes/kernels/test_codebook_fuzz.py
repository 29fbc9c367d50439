# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer; `make fuzz-kernels` runs a million layers."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_hostile_layers_are_refused_or_right_under_sanitizers(cmake_build: Path) -> None:
    folder = cmake_build.parent / "sanitized"
    configure = ["cmake", "-S", str(ROOT / "runtimes" / "kernels"), "-B", str(folder), "-DCODEBOOK_SANITIZE=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", str(folder), "--target", "fuzz"], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("this compiler comes without AddressSanitizer")
    assert built.returncode == 0, built.stdout + built.stderr
    ran = subprocess.run([str(folder / "fuzz"), "2000"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("2000 layers: ")
    assert 500 < int(ran.stdout.split()[2]) < 1900  # some of both
