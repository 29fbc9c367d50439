# SPDX-License-Identifier: Apache-2.0
"""The app's core on a JVM, beside Python: run by Maven, with what Python computes in this very run."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest

from turbopocket.export.build.build import build
from turbopocket.export.checkpoint.tokenizer import tokenizer_json
from turbopocket.export.families.tokenizers import CLIP
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import load_recipe, make_recipe
from turbopocket.pocket.scenes import captions
from turbopocket.runtimes.kernels.library import onnx_operators

from ..runtimes.drawing.test_sampler_table import KINDS
from .android_golden import write_golden, write_walks

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "android_demo"
POCKET = ROOT / "pocket" / "turbo_weights"
SOURCES = sorted(path for path in DEMO.rglob("*.kt*") if path.suffix in (".kt", ".kts") and "target" not in path.parts)
PROMPTS = ["a red circle", "the blue square, on a white triangle!", "Ein grüner Kreis " * 20]


@pytest.fixture(scope="module")
def maven() -> list[str]:
    """Maven's command, once what it needs is there, and the app compiled; fetched by the first run, offline afterwards.

    What runs tests is fetched when one is run, so a short one is.
    """
    if shutil.which("mvn") is None or shutil.which("java") is None:
        pytest.skip("android_demo is built by Maven and Java 17, which are not installed")
    for mode in (["--offline"], []):
        command = ["mvn", "--quiet", "--batch-mode", *mode, "--file", str(DEMO / "pom.xml")]
        ran = subprocess.run([*command, "test", "-Dtest=SplitTest"], capture_output=True, text=True, check=False)
        if ran.returncode == 0:
            return command
    if missing := re.search(r"Could not (resolve|transfer|find)[^\n]*", ran.stdout + ran.stderr):
        pytest.skip(f"android_demo needs what Maven can not fetch here: {missing[0][:200]}")
    return pytest.fail((ran.stdout + ran.stderr)[-6000:])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model's tokenizers as an artifact has them."""
    found = {}
    for name in ("tokenizer", "tokenizer_2"):
        found[f"pocket {name}"] = tmp_path_factory.mktemp(name) / "tokenizer.json"
        found[f"pocket {name}"].write_bytes(tokenizer_json(POCKET / name, CLIP))
    return found


@pytest.fixture(scope="module")
def golden(built: Any, tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Python computes."""
    folder = tmp_path_factory.mktemp("android") / "golden"
    own = {f"tiny {name}": built.folder / name / "tokenizer.json" for name in ("tokenizer", "tokenizer_2")}
    write_golden(folder, built.folder, tokenizers | own, PROMPTS)
    write_walks(folder, KINDS)
    return folder


def test_the_core_does_what_python_does(maven: list[str], golden: Path) -> None:
    print(run(maven, golden))
    found = reported()
    assert found.pop("tests") > 80
    assert set(found.values()) == {0}


def test_codebook_operators_of_ours_run_in_the_jvm(
    maven: list[str], tokenizers: dict[str, Path], recipe_values: dict[str, Any], tiny_sd: Path, tmp_path: Path
) -> None:
    """By `registerCustomOpLibrary`, in a binding older than the one that built the artifact."""
    library = onnx_operators()
    if library is None:
        pytest.skip("the library of our operators is not built (make kernels)")
    one, two = ("unet.*.to_q", "unet.*.conv2"), ("unet.*.ff.*", "unet.*.conv1")
    pins = dict.fromkeys(one, "vq8-d4") | dict.fromkeys(two, "avq2x8-d8")
    asked = {"model": {"source": str(tiny_sd)}, "compress": {"formats": ["fp16"], "pin": pins, "fit": "absmax"}}
    artifact = tmp_path / "artifact"
    build(make_recipe({**recipe_values, **asked}, "test"), artifact, progress=StageProgress(quiet=True))
    unet = onnx.load(artifact / "unet" / "model.onnx", load_external_data=False)
    assert len({node.op_type for node in unet.graph.node if node.domain == "turbopocket"}) == 4
    write_golden(tmp_path / "golden", artifact, tokenizers, PROMPTS)
    (tmp_path / "golden" / "walks.json").write_text("[]")
    for operators in (library, None):
        options = [] if operators is None else [f"-Doperators={operators}"]
        run(maven, tmp_path / "golden", "-Dtest=PictureTest", *options)
        assert reported() == {"tests": 6, "failures": 0, "errors": 0, "skipped": 0}
    with pytest.raises(AssertionError, match=r"nowhere\.so"):  # so the library is what the session asks
        run(maven, tmp_path / "golden", "-Dtest=PictureTest", f"-Doperators={tmp_path / 'nowhere.so'}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["demo", "codebooks"])
def test_fifty_pictures_of_a_bundled_model(
    recipe: str, maven: list[str], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    build(load_recipe(recipe), artifact, overwrite=False, progress=StageProgress(quiet=True))
    write_golden(tmp_path / "golden", artifact, tokenizers, captions("test", 50, seed=0))
    (tmp_path / "golden" / "walks.json").write_text("[]")
    print(recipe, python_memory(artifact))
    libraries = [None, onnx_operators()] if recipe == "codebooks" and onnx_operators() else [None]
    for library in libraries:
        options = [] if library is None else [f"-Doperators={library}"]
        print(recipe, library, run(maven, tmp_path / "golden", "-Dtest=PictureTest", *options))
        assert reported() == {"tests": 53, "failures": 0, "errors": 0, "skipped": 0}


def test_versions_are_told_alike() -> None:
    """Gradle's catalog and Maven's properties."""
    catalog = tomllib.loads((DEMO / "gradle" / "libs.versions.toml").read_text())["versions"]
    properties = dict(re.findall(r"<([a-z]+)\.version>([^<]+)<", (DEMO / "pom.xml").read_text()))
    shared = catalog.keys() & properties.keys()
    assert shared >= {"kotlin", "serialization", "onnxruntime", "junit"}
    assert {name: catalog[name] for name in shared} == {name: properties[name] for name in shared}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(DEMO)))
def test_sources_stay_readable(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 120


def run(maven: list[str], golden: Path, *options: str) -> str:
    """What the core's tests print of memory; fails with the end of Maven's words where one of them fails.

    They are run as they were compiled for `maven`: Kotlin's compiler takes longer than they do.
    """
    shutil.rmtree(DEMO / "core" / "target" / "surefire-reports", ignore_errors=True)
    command = [*maven, "--projects", "core", "surefire:test", f"-Dgolden={golden}", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return "\n".join(line for line in ran.stdout.splitlines() if "resident" in line)


def python_memory(artifact: Path) -> str:
    """What a process that draws one picture says of its memory."""
    code = (
        "import sys; from turbopocket.export.artifact import Artifact; "
        "Artifact.open(sys.argv[1]).generate('a red circle'); print(open('/proc/self/status').read())"
    )
    ran = subprocess.run([sys.executable, "-c", code, artifact], capture_output=True, text=True, check=True)
    return "peak resident memory of Python: " + re.findall(r"VmHWM:\s*(.*)", ran.stdout)[0]


def reported() -> dict[str, int]:
    """Sums of what the run reported."""
    found = [path.read_text() for path in (DEMO / "core" / "target" / "surefire-reports").glob("TEST-*.xml")]
    heads = [re.search(r"<testsuite [^>]*>", text, re.S) for text in found]
    values = [dict(re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', head[0])) for head in heads if head]
    return {name: sum(int(each[name]) for each in values) for name in ("tests", "failures", "errors", "skipped")}
