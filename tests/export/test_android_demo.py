# SPDX-License-Identifier: Apache-2.0
"""The app's core on a JVM, beside Python: run by Maven, with what Python computes in this very run."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.tokenizer import tokenizer_json
from turbopocket.export.families.tokenizers import CLIP

from ..runtimes.test_sampler_table import KINDS
from .android_golden import write_golden, write_walks

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "android_demo"
POCKET = ROOT / "pocket" / "turbo_weights"
PROMPTS = ["a red circle", "the blue square, on a white triangle!", "Ein grüner Kreis " * 20]


@pytest.fixture(scope="module")
def maven() -> list[str]:
    """Maven's command, once what it needs is there; fetched by the first run, offline afterwards."""
    if shutil.which("mvn") is None or shutil.which("java") is None:
        pytest.skip("android_demo is built by Maven and Java 17, which are not installed")
    for mode in (["--offline"], []):
        command = ["mvn", "--quiet", "--batch-mode", *mode, "--file", str(DEMO / "pom.xml")]
        if subprocess.run([*command, "test-compile"], capture_output=True, check=False).returncode == 0:
            return command
    fetched = subprocess.run([*command, "dependency:resolve"], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip("android_demo needs libraries from Maven Central, which is not reached")
    return command


@pytest.fixture(scope="module")
def golden(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Python computes."""
    folder = tmp_path_factory.mktemp("android") / "golden"
    tokenizers = {f"tiny {name}": built.folder / name / "tokenizer.json" for name in ("tokenizer", "tokenizer_2")}
    for name in ("tokenizer", "tokenizer_2"):
        path = tmp_path_factory.mktemp(name) / "tokenizer.json"
        path.write_bytes(tokenizer_json(POCKET / name, CLIP))
        tokenizers[f"pocket {name}"] = path
    write_golden(folder, built.folder, tokenizers, PROMPTS)
    write_walks(folder, KINDS)
    return folder


def test_the_core_does_what_python_does(maven: list[str], golden: Path) -> None:
    ran = subprocess.run([*maven, "test", f"-Dgolden={golden}"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert reported(DEMO / "core")["failures"] == 0


def reported(module: Path) -> Mapping[str, int]:
    """Sums of the tests that a module's run reported; a run without any has failed."""
    found = [path.read_text() for path in (module / "target" / "surefire-reports").glob("TEST-*.xml")]
    sums = {}
    for name in ("tests", "failures", "errors", "skipped"):
        sums[name] = sum(int(re.search(rf'<testsuite [^>]*\b{name}="(\d+)"', text)[1]) for text in found)  # type: ignore[index]
    assert sums["tests"] > 0, "no test ran"
    return sums
