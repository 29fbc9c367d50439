# SPDX-License-Identifier: Apache-2.0
"""Damaged codebook artifacts through our own operators, compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

What they would read or write beside their tensors ends the child by SIGABRT, which the corpus counts as a native crash.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .children import Children
from .corpus import damaged_artifacts

ROOT = Path(__file__).parents[2]
SOURCES, BUILD = ROOT / "runtimes" / "kernels", ROOT / "build" / "kernels"
FORMATS = "avq2x8-d4,vq8-d4,int8-row"
SHORT = "sampler.steps=1", "sampler.guidance=1", "calibrate.pictures=1", "parity.pictures=1"
PLANTED = """
import turbopocket.runtimes.kernels.library as m
from pathlib import Path
m.onnx_operators = lambda: Path({operators!r})
"""
OVERFLOW = "import ctypes; ctypes.memset(ctypes.create_string_buffer(1 << 20), 0, (1 << 20) + 64)"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def operators() -> str:
    """The operators for ONNX Runtime with sanitizers in them."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler: the kernels cannot be built here")
    if not (BUILD / "headers" / "onnxruntime_c_api.h").is_file():
        pytest.skip("no ONNX Runtime headers: make kernels fetches them")
    folder = BUILD / "sanitized-operators"
    options = "-DCODEBOOK_SANITIZE=ON", f"-DONNXRUNTIME_HEADERS={BUILD / 'headers'}"
    subprocess.run(["cmake", "-S", SOURCES, "-B", folder, *options], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", "codebook_onnxruntime"], check=True)
    return str(folder / "libcodebook_onnxruntime.so")


@pytest.fixture(scope="module")
def sanitized(operators: str) -> Iterator[Children]:
    """Children in which the sanitizers' libraries are loaded before anything else, as they have to be."""
    names = "libasan.so", "libubsan.so"
    found = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    # Of Python and its libraries, which are not compiled so, nobody here can mend a leak.
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "abort_on_error=1"}
    with Children({"LD_PRELOAD": " ".join(found), **options}) as started:
        yield started


@pytest.fixture(scope="module")
def artifact(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, of whose layers our operators run those that they can."""
    folder = tmp_path_factory.mktemp("sanitized")
    assigned = [text for each in SHORT for text in ("--set", each)]
    with Children() as children:
        ran = children.command(folder, "build", tiny_sd, "--out", "art", "--formats", FORMATS, *assigned, seconds=900)
    assert ran.code == 0, ran.err
    assert (folder / "art.report" / "plan.json").read_text().count('"avq2x8-d4"') > 20
    return folder / "art"


def test_damaged_codebooks_are_refused_or_run_within_their_tensors(
    sanitized: Children, operators: str, artifact: Path, tmp_path: Path
) -> None:
    planted = PLANTED.format(operators=operators)
    tally = damaged_artifacts(sanitized, artifact, tmp_path / "case", range(1000, 1060), planted)
    print(tally)
    assert not tally.faults, f"{tally}\n" + "\n".join(tally.faults)


def test_an_overflow_is_found(sanitized: Children, operators: str, artifact: Path, tmp_path: Path) -> None:
    tally = damaged_artifacts(sanitized, artifact, tmp_path / "case", range(1000, 1002), OVERFLOW)
    assert tally.ends["native crash (signal 6)"] == 2, str(tally)
