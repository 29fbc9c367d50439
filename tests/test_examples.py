# SPDX-License-Identifier: Apache-2.0
"""The examples of docs, as far as they run without a runtime: their tokenizer, held against the library's."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from turbopocket.export.checkpoint.load import load_shapes, tokenizer_json
from turbopocket.runtimes.drawing.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
DRAW = ROOT / "docs" / "examples" / "draw.mjs"
HEADERS = ROOT / "build" / "kernels" / "headers"
PROMPTS = [
    "a large red circle left of a small blue square on a white background",
    "  It's   the CAT'S  pyjamas, isn't it?! 42 times... ",
    "naïve café — Ünïcode 日本語 🎈 e\u0301",
    "one\ttwo\nthree <|endoftext|> x" + " word" * 120,
    "!",
]
SCRIPT = """
import { readFileSync } from "node:fs";
import { ClipTokenizer } from DRAW;
const asked = JSON.parse(readFileSync(0, "utf8"));
const rules = JSON.parse(readFileSync(asked.file, "utf8"));
const tokenizer = new ClipTokenizer(rules, 77);
console.log(JSON.stringify(asked.prompts.map((each) => tokenizer.encode(each))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_the_examples_tokenizer_gives_the_librarys_ids(name: str, tmp_path: Path) -> None:
    model = load_shapes("pocket")
    file = tmp_path / "tokenizer.json"
    file.write_bytes(tokenizer_json(model.folder / name, model.family.tokenizer, model.text_tokens))
    command = ["node", "--input-type=module", "-e", SCRIPT.replace("DRAW", json.dumps(DRAW.as_uri()))]
    asked = json.dumps({"file": str(file), "prompts": PROMPTS})
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = Tokenizer(file, 77)
    for prompt, found in zip(PROMPTS, json.loads(done.stdout), strict=True):
        assert found == library.encode(prompt).ids.tolist(), prompt


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_shown_cpp_compiles_against_onnx_runtimes_header() -> None:
    if not (HEADERS / "onnxruntime_c_api.h").is_file():
        pytest.skip("no ONNX Runtime headers: make kernels fetches them")
    (shown,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "docs" / "using-an-artifact.md").read_text(), flags=re.DOTALL)
    command = ["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-isystem", str(HEADERS), "-x", "c++", "-"]
    done = subprocess.run(command, input=shown, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
