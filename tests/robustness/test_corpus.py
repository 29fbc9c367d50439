# SPDX-License-Identifier: Apache-2.0
"""No damaged model or artifact and no hostile request brings a traceback, a hang, a native crash or a wrong success.

A part of the corpus each time; `make test-fuzz` runs all of it and prints how the cases ended.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from .children import SECONDS, Children
from .corpus import Tally, damaged_artifacts, damaged_models, hostile_requests

WHOLE = settings.default.max_examples >= 6_000
TARGETS = ("onnx", "coreml", "executorch") if WHOLE else ("onnx", "coreml")
"""ExecuTorch takes longest to lower, and each of its cases starts a process: `make test-fuzz` has them."""
SHORT = (
    *("sampler.steps=1", "sampler.guidance=1", "calibrate.pictures=1", "parity.pictures=1", "compress.fit=absmax"),
    f"target.also={json.dumps(TARGETS[1:])}",
)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with Children() as started:
        yield started


@pytest.fixture(scope="module")
def artifacts(children: Children, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, built for each of the targets."""
    folder = tmp_path_factory.mktemp("artifacts")
    assigned = [text for each in SHORT for text in ("--set", each)]
    ran = children.command(
        folder, "build", tiny_sd, "--out", "all", "--formats", "fp16,int8-row", *assigned, seconds=500
    )
    assert ran.code == 0, ran.err
    return folder / "all"


PREPARED = """
import os, threading, time, turbopocket.export.artifact as m
zero = lambda file: file.write_bytes(bytes(file.stat().st_size))
"""
PLANTED = {
    "bug": "lambda *_: [][0]",
    "traceback": "lambda *_: (each := threading.Thread(target=lambda: [][0])).start() or each.join()",
    "hang": "lambda *_: time.sleep(60)",
    "native crash (signal 11)": "lambda *_: os.kill(os.getpid(), 11)",
    "exit code 5": "lambda *_: os._exit(5)",
    "a refusal without its sentence": "lambda *_: exit(1)",
    "wrong success: another picture": "lambda folder, _: zero(folder / 'unet' / 'model.onnx.data')",
}
"""What the check of an artifact's files does in its place, by what the corpus is to call it."""


def seeds(part: int, whole: int) -> range:
    return range(whole if WHOLE else part)


def require_clean(tally: Tally, report: Callable[[str], None] = print) -> None:
    report(str(tally))
    assert not tally.faults, f"{tally}\n" + "\n".join(tally.faults)


def test_damaged_models_are_refused_in_one_sentence(children: Children, tiny_sd: Path, tmp_path: Path) -> None:
    require_clean(damaged_models(children, tiny_sd, tmp_path / "case", seeds(30, 300)))


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_artifacts_are_refused_or_draw_the_same(
    children: Children, artifacts: Path, tmp_path: Path, target: str
) -> None:
    require_clean(damaged_artifacts(children, artifacts / target, tmp_path / "case", seeds(16, 300)))


def test_hostile_requests_are_one_sentence(children: Children, artifacts: Path, tiny_sd: Path, tmp_path: Path) -> None:
    require_clean(hostile_requests(children, tiny_sd, artifacts / "onnx", tmp_path / "case", seeds(20, 300)))


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(children: Children, artifacts: Path, tmp_path: Path, fault: str) -> None:
    planted = f"{PREPARED}\nm.verify = {PLANTED[fault]}"
    of = range(9) if "picture" in fault else range(3)  # every fourth manifest does not agree with its files
    seconds = 10 if fault == "hang" else SECONDS  # any other may take as long as a busy machine makes it
    tally = damaged_artifacts(children, artifacts / "onnx", tmp_path / "case", of, planted, seconds)
    assert tally.ends[fault] > 0, str(tally)
    assert len(tally.faults) == sum(count for end, count in tally.ends.items() if end not in ("success", "refusal"))
