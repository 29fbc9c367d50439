# SPDX-License-Identifier: Apache-2.0
"""A wrong request is refused before PyTorch is imported, whatever the verb; asked where importing it is impossible."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from turbopocket.export.rewrites.names import REWRITE_NAMES
from turbopocket.export.rewrites.registry import REWRITES
from turbopocket.quant.distill.options import METHOD_NAMES
from turbopocket.quant.distill.trainer import METHODS
from turbopocket.quant.fit import FITS
from turbopocket.quant.formats import FORMATS
from turbopocket.quant.names import FIT_NAMES, FORMAT_NAMES

RUN_ALL = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
for name in ("torch", "diffusers", "transformers", "accelerate"):
    sys.modules[name] = None  # what Python's import then finds absent
from turbopocket.cli import main
found = []
for asked in json.load(sys.stdin):
    sys.argv = ["turbopocket", *asked]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
NO_ARTIFACT = "{empty} is not an artifact: it holds no manifest.json"
NO_MODEL = "{empty} has no model_index.json, so it is not a diffusers pipeline folder: it holds nothing"
NOWHERE = "'nowhere' is neither a bundled model"
PLAN, BUILD, DISTILL = "plan", "build --out {new}", "distill --out {new}"
CASES = {
    "check {empty}": NO_ARTIFACT,
    "check {empty} --cpu arm64:none": "`arm64:none` is not an emulated CPU",
    "check {empty} --cpu arm64:i8mm --cache {empty}": "{empty} holds no emulated ARM CPU",
    "check {empty} --cpu arm64:i8mm --self-test": "the self-test runs here alone",
    "report {empty}": NO_ARTIFACT,
    "generate {empty} circle --out {new}.png": NO_ARTIFACT,
    "generate {empty} circle --out {new}.gif": "output {new}.gif is of no kind that is written",
    "clean /": "output / is the root of the file system",
    "recipe show nothing": "recipe 'nothing' is neither a .toml file nor a shipped recipe",
    "recipe show --set compress.budgt=8MB": "command line: unknown key `budgt` in [compress]",
    f"{PLAN} --device nokia": "no device is called nokia",
    f"{PLAN} --measured {{new}}": "{new} is not a file; --measured takes",
    f"{PLAN} nowhere": NOWHERE,
    f"{PLAN} {{empty}}": NO_MODEL,
    f"{PLAN} {{new}}.safetensors": "{new}.safetensors does not exist",
    f"{PLAN} {{lora}}": "{lora} is a LoRA; supported are checkpoints of Stable Diffusion",
    f"{PLAN} {{file}}": "{file} is a .txt file; allowed is a checkpoint in .safetensors",
    f"{PLAN} {{lora}} --config nowhere": f"config: {NOWHERE}",
    f"{PLAN} pocket --config pocket": "config 'pocket' was given for pocket, which has configs of its own",
    f"{PLAN} --budget 8elephants": "command line: budget '8elephants' is not a number with a unit",
    f"{PLAN} --target tflite": "command line: `tflite` is not a target",
    f"{PLAN} --recipe fast": "recipe 'fast' is neither a .toml file nor a shipped recipe",
    f"{PLAN} --set 8MB": "--set '8MB' is not KEY=VALUE",
    f"{PLAN} --pin unet": "--pin 'unet' is not GLOB=FORMAT",
    f"{PLAN} --pin unet=fp17": "command line: `fp17` is not a weight format",
    f"{PLAN} --formats int8-row+a9-static": "command line: `int8-row+a9-static`: `a9-static` is no format of",
    f"{PLAN} --fit best": "command line: `best` is not a fit: known are absmax",
    f"{PLAN} --set compress.rewrites=['none']": "command line: none is no rewrite",
    f"{PLAN} --size 9": "command line: size '9' is not WIDTHxHEIGHT",
    f"{BUILD} {{empty}}": NO_MODEL,
    f"{BUILD} --lora {{new}}.safetensors": "the LoRA {new}.safetensors does not exist",
    f"{BUILD} --lora {{file}}": "the LoRA {file} is a .txt file",
    f"{BUILD} --set calibrate.prompts={{new}}": "prompt file {new} does not exist",
    f"{BUILD} --workers 0": "workers: at least 1, not 0",
    "measure --out {new} --workers 0": "workers: at least 1, not 0",
    "build --out {file}": "output {file} is a file; it must be a new or empty folder",
    "build --out {full}": "output folder {full} is not empty",
    "build --out {full} --target onnx --target executorch --overwrite": "output folder {full} is not empty and has no",
    "build --out {new} --run {full}": "{full} holds lora.safetensors, which this command did not make",
    "calibrate --out {new} {empty}": NO_MODEL,
    "measure --out {new} {empty}": NO_MODEL,
    "compress --out {new} {empty}": NO_MODEL,
    "lower --out {new} {empty}": NO_MODEL,
    "lower --out {new} --run {full}": "{full} holds lora.safetensors, which this command did not make",
    f"{DISTILL} {{empty}}": NO_MODEL,
    f"{DISTILL} --recipe none": "recipe 'none' is neither a .toml file nor a shipped recipe",
    f"{DISTILL} --set distill.method=none": "command line: method 'none' is not known: known are tdm, mse",
    f"{DISTILL} --steps 9": "command line: steps = 9: allowed are 1 to 8",
    f"{DISTILL} --prompts {{new}}": "prompt file {new} does not exist",
    "distill --out {full}": "output folder {full} is not empty",
}
"""What is asked, and how the one sentence begins."""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("requests")
    full = root / "full"
    for folder in (root / "empty", full):
        folder.mkdir()
    file = root / "file.txt"
    file.write_text("text")
    layer = np.zeros((4, 4), np.float32)
    lora = full / "lora.safetensors"
    save_file({f"unet.mid_block.to_q.{part}.weight": layer for part in ("lora_A", "lora_B")}, lora)
    return {
        name: str(path) for name, path in {"empty": root / "empty", "full": full, "file": file, "lora": lora}.items()
    }


@pytest.fixture(scope="module")
def ran(places: dict[str, str]) -> dict[str, Ran]:
    """All of them, one after the other in one process: what one of them imports, all are found to import."""
    new = {"new": str(Path(places["full"]).with_name("new"))}
    asked = json.dumps([[word.format(**places, **new) for word in case.split()] for case in CASES])
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, (Ran(*each) for each in json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_request_is_refused_without_pytorch(ran: dict[str, Ran], places: dict[str, str], case: str) -> None:
    expected = CASES[case].format(**places, new=str(Path(places["full"]).with_name("new")))
    assert ran[case].err.startswith(f"error: {expected}")
    assert (ran[case].code, ran[case].out) == (1, "")


def test_what_was_refused_left_nothing(ran: dict[str, Ran], places: dict[str, str]) -> None:
    root = Path(places["full"]).parent
    assert len(ran) == len(CASES)
    assert sorted(path.name for path in root.rglob("*")) == ["empty", "file.txt", "full", "lora.safetensors"]


def test_names_that_recipes_know_are_those_of_what_there_is() -> None:
    assert [kind.__mro__[1] for kind in FORMATS] == list(FORMAT_NAMES)
    assert tuple(fit.name for fit in FITS) == FIT_NAMES
    assert tuple(REWRITES) == REWRITE_NAMES
    assert tuple(METHODS) == METHOD_NAMES
