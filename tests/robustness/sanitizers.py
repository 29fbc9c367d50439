# SPDX-License-Identifier: Apache-2.0
"""Our operators with AddressSanitizer and UndefinedBehaviorSanitizer in them, and what loading them takes."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES, KERNELS = ROOT / "runtimes" / "kernels", ROOT / "build" / "kernels"


def built(target: str, *options: str) -> Path:
    """The library of operators that CMake calls `target`; skips the test where it can not be compiled."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler: the kernels cannot be built here")
    folder = KERNELS / "sanitized-operators"
    subprocess.run(["cmake", "-S", SOURCES, "-B", folder, "-DCODEBOOK_SANITIZE=ON", *options], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", target], check=True)
    return folder / f"lib{target}.so"


def environment(reports: Path | None = None) -> dict[str, str]:
    """What a process has to be started with: the sanitizers' libraries are loaded before anything else.

    A fault ends it by SIGABRT; what is said of it goes into a file that begins with `reports`, by default to stderr.
    """
    names = "libasan.so", "libubsan.so"
    found = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    place = f":log_path={reports}" if reports else ""
    # Of Python and its libraries, which are not compiled so, nobody here can mend a leak.
    options = f"detect_leaks=0:abort_on_error=1{place}", f"abort_on_error=1{place}"
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options[0], "UBSAN_OPTIONS": options[1]}
