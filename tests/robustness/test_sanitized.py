# SPDX-License-Identifier: Apache-2.0
"""Damaged codebook artifacts through our own operators, compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

What they would read or write beside their tensors ends the child by SIGABRT, which the corpus counts as a native crash.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .children import Children
from .corpus import damaged_artifacts
from .sanitizers import KERNELS, built, environment

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
    headers = KERNELS / "headers"
    if not (headers / "onnxruntime_c_api.h").is_file():
        pytest.skip("no ONNX Runtime headers: make kernels fetches them")
    return str(built("codebook_onnxruntime", f"-DONNXRUNTIME_HEADERS={headers}"))


@pytest.fixture(scope="module")
def sanitized(operators: str) -> Iterator[Children]:
    """Children that can load them."""
    with Children(environment()) as started:
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
