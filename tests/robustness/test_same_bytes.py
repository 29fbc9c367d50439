# SPDX-License-Identifier: Apache-2.0
"""A request has one answer: the same bytes whatever the process, the machine's settings and the places are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ("--steps", "2", "--guidance", "1")
SET = ("--set", "calibrate.pictures=1", "--set", "parity.pictures=1")
ASKED = {
    "onnx": ("--formats", "int8-g32,int4-g32,fp16", "--budget", "1000kB"),
    "coreml": ("--formats", "int8-g32,int4-g32,fp16", "--budget", "1000kB"),
    "executorch": ("--formats", "int8-row,int4-g32,fp32", "--budget", "1800kB"),
}
"""What leaves layers of each target a choice: no plan may be of one format."""
REPORTED = ("plan.json", "choices.json")
COMMAND = """
import os, sys
from turbopocket.cli import main
from turbopocket.quant import row_losses
row_losses.WORTH_SECONDS, row_losses.KEPT_BYTES = 0.0, 1
os.umask(int(sys.argv.pop(1), 8))
main()
"""
"""Rows are measured alone, and by workers where there are some."""
OTHER = {"PYTHONHASHSEED": "12345", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}


@pytest.fixture(scope="module")
def published(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose configs leave out settings, as those that an older diffusers saved do."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path_factory.mktemp("published") / "model"))
    for path in (folder / "unet" / "config.json", folder / "vae" / "config.json"):
        config = json.loads(path.read_text())
        for key in ("act_fn", "dropout", "mid_block_add_attention", "use_quant_conv"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    return folder


def built(model: Path, folder: Path, *options: str, umask: str = "022", **environment: str) -> dict[str, bytes]:
    """The files of an artifact that a fresh process built in `folder`, and what its report says of losses."""
    shutil.copytree(model, folder / "model")
    asked = ("build", "model", "--out", "art", *SHORT, *SET, *options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"} | environment
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, umask, *asked], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in (folder / "art").rglob("*") if path.is_file()]
    files += [folder / "art.report" / name for name in REPORTED]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def different(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ASKED)
def test_hash_seed_path_locale_umask_and_workers_leave_the_bytes_as_they_are(
    target: str, published: Path, tmp_path: Path
) -> None:
    asked = "--target", target, *ASKED[target]
    expected = built(published, tmp_path / "a", *asked)
    assert len(expected) > 5
    assert len({each["scheme"] for each in json.loads(expected["art.report/plan.json"])["choices"]}) > 1
    elsewhere = tmp_path / "another" / "and longer path"
    found = built(published, elsewhere, *asked, "--workers", "2", umask="077", **OTHER)
    assert different(found, expected) == []


@pytest.mark.slow
def test_threads_change_nothing_but_what_pytorch_measured(published: Path, tmp_path: Path) -> None:
    """PyTorch adds up in another order: what a fit reads of activations has other last digits, `absmax` reads none.

    Neither does what its plan compares, so losses differ as activations do, by 1e-6 of them. A fit that reads them, as
    `mse` does, may take the scale beside for a group, which moved the loss of one layer by 1.6 % here.
    """
    asked = *ASKED["onnx"], "--fit", "absmax"
    one, two = (built(published, tmp_path / count, *asked, OMP_NUM_THREADS=count) for count in "12")
    measured = {"art/manifest.json", "art.report/plan.json", "art.report/choices.json"}
    shown = {"art/self_check/latents.f32", "art/self_check/picture.rgb"}
    assert set(different(one, two)) <= measured | shown
    plans = [json.loads(files["art.report/plan.json"]) for files in (one, two)]
    losses = [[plan.pop("predicted_loss"), *(each.pop("loss") for each in plan["choices"])] for plan in plans]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert plans[0] == plans[1]
