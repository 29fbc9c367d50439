# SPDX-License-Identifier: Apache-2.0
"""What `pip install` of the built wheel would put on a machine."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths inside the wheel built from this tree."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    assert wheel.stat().st_size < 80_000_000  # two models of 25 MB each, one of 20
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_owns_one_name_and_no_bare_folder(wheel_names: set[str]) -> None:
    tops = {name.split("/", 1)[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"turbopocket"}


def test_wheel_holds_every_source_file(wheel_names: set[str]) -> None:
    sources = {
        f"turbopocket/{path.relative_to(ROOT).as_posix()}"
        for folder in ("ground", "export", "quant", "runtimes", "pocket")
        for path in (ROOT / folder).rglob("*.py")
    } | {f"turbopocket/{path.name}" for path in (ROOT / "api").glob("*.py")}
    assert sources <= wheel_names


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "export/recipes/demo.toml",
        "export/recipes/distill/pocket-turbo.toml",
        "export/recipes/prompts.txt",
        "export/report/page.html.jinja",
        "quant/fit/native/CMakeLists.txt",
        "quant/fit/native/core/rows.h",
        "runtimes/executorch/native/CMakeLists.txt",
        "runtimes/executorch/native/main.cpp",
        "runtimes/executorch/native/wire.h",
        "pocket/weights/model_index.json",
        "pocket/weights/unet/diffusion_pytorch_model.safetensors",
        "pocket/weights/judge/judge.safetensors",
        "pocket/turbo_weights/unet/step_biases.safetensors",
        "pocket/weights/tokenizer_2/merges.txt",
        "pocket/dit_weights/transformer/diffusion_pytorch_model.safetensors",
    ],
)
def test_wheel_holds_the_data_that_code_reads(wheel_names: set[str], name: str) -> None:
    assert f"turbopocket/{name}" in wheel_names


def test_wheel_has_a_command(wheel_names: set[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_names)
