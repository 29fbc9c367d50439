# SPDX-License-Identifier: Apache-2.0
"""A build that fits block by block, killed and started again: it goes on where it was, and ends with the same files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.build import build
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.quant import sequential
from turbopocket.runtimes.manifest import load_manifest

QUIET = StageProgress(quiet=True)
FINISHED = 3
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from turbopocket.export.build.build import build
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.quant import sequential
torch.set_num_threads(int(sys.argv[4]))
honest, saved = sequential.save_weights, []
def save(path, weights):
    honest(path, weights)
    saved.append(path)
    if len(saved) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
sequential.save_weights = save
build(make_recipe(json.loads(sys.argv[1]), "test"), Path(sys.argv[2]), False, StageProgress(quiet=True))
"""


def test_killed_build_goes_on_where_it_was_and_gives_the_same_files(
    tiny_sd: Path, tmp_path: Path, recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    compress = {**recipe_values["compress"], "budget": "1100kB", "sequential": True}
    values = {**recipe_values, "model": {"source": str(tiny_sd)}, "compress": compress}
    recipe, out = make_recipe(values, "test"), tmp_path / "two" / "art"
    out.parent.mkdir()
    command = [sys.executable, "-c", KILLED, json.dumps(values), out, str(FINISHED), str(torch.get_num_threads())]
    assert subprocess.run(command, check=False).returncode == -9
    assert not out.exists()
    blocks = list(out.with_name("art.run").glob("sequential-*/*.safetensors"))
    assert len(blocks) == FINISHED

    saved, honest = [], sequential.save_weights
    monkeypatch.setattr(sequential, "save_weights", lambda path, weights: (saved.append(path), honest(path, weights)))
    resumed = build(recipe, out, overwrite=False, progress=QUIET)
    made = len(saved)
    whole = build(recipe, tmp_path / "one" / "art", overwrite=False, progress=QUIET)
    assert made == len(saved) - made - FINISHED
    assert not set(blocks) & set(saved)
    assert load_manifest(resumed.folder).files == load_manifest(whole.folder).files
    assert sorted(path.name for path in out.parent.glob("art*")) == ["art", "art.report", "art.run"]
