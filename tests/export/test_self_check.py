# SPDX-License-Identifier: Apache-2.0
"""A build records one walk; whoever computes it otherwise is told so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.export.artifact import Artifact
from turbopocket.runtimes.compare.replay import Recorder
from turbopocket.runtimes.compare.self_check import Outputs, outputs_of
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import file_entries, load_manifest
from turbopocket.runtimes.open import open_runner

Run = Callable[..., Any]


def rewritten(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest changed, and its hashes those of the files."""
    path = artifact / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values["files"] = [entry.model_dump() for entry in file_entries(artifact)]
    path.write_text(json.dumps(values))


def test_a_build_records_its_own_reference(built: Any) -> None:
    manifest = load_manifest(built.folder)
    spec = manifest.self_check
    assert spec is not None
    assert spec.step == 1  # the last of two
    assert {name: each.snr_floor_db for name, each in spec.outputs.items()} == {"latents": 20, "picture": 20}
    found = Outputs.read(built.folder, manifest, spec)
    # With all its steps, the recorded picture is the one that anybody gets for this prompt and seed.
    drawn = np.asarray(Artifact.open(built.folder).generate(spec.prompt, spec.seed))
    assert found.picture is not None
    assert np.abs(drawn.astype(int) - found.picture).max() <= 1
    assert np.ptp(found.picture) > 0
    assert np.ptp(found.latents) > 0


def test_the_artifact_alone_is_enough(turbopocket: Run, built: Any, tmp_path: Path) -> None:
    shutil.copytree(built.folder, tmp_path / "art")  # without a report, and the model is not asked for
    ran = turbopocket("check", tmp_path / "art", "--self-test", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["self_test"]
    assert found["passed"]
    assert found["snr_db"]["latents"] > 40
    assert (found["snr_db"]["picture"] or 100) > 40  # null: equal pictures


def test_a_floor_that_nothing_meets_fails_with_the_figure(turbopocket: Run, artifact: Path) -> None:
    rewritten(artifact, lambda values: values["self_check"]["latents"].update(snr_floor_db=500.0))
    ran = turbopocket("check", artifact, "--self-test")
    assert ran.code == 3
    assert "this device computes wrong: latents of the self-check have" in ran.err
    assert "500.0 dB are needed" in ran.err


def test_another_picture_fails(turbopocket: Run, artifact: Path) -> None:
    file = artifact / "self_check" / "picture.rgb"
    file.write_bytes(bytes(255 - value for value in file.read_bytes()))
    rewritten(artifact, lambda values: None)
    ran = turbopocket("check", artifact, "--self-test")
    assert ran.code == 3
    assert "this device computes wrong: picture of the self-check have" in ran.err


def test_weights_that_are_not_the_builds_fail(turbopocket: Run, artifact: Path) -> None:
    file = max((artifact / "unet").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    rewritten(artifact, lambda values: None)
    ran = turbopocket("check", artifact, "--self-test")
    assert ran.code == 3, ran.err
    assert "this device computes wrong" in ran.err


def test_the_walk_ends_after_the_step(built: Any) -> None:
    manifest, calls = load_manifest(built.folder), []
    assert manifest.self_check is not None
    for step in (0, 1):
        recorder = Recorder(open_runner(built.folder, manifest))
        spec = manifest.self_check.model_copy(update={"step": step})
        outputs_of(recorder, manifest, open_tokenizers(built.folder, manifest), spec)
        calls.append(sum(call.component == "unet" for call in recorder.calls))
    assert calls[1] == 2 * calls[0] > 0


def without(values: dict[str, Any]) -> None:
    del values["self_check"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, "has no self-check"),
        (lambda values: values["self_check"].update(step=2), "is of step 2; the sampler has 2"),
        (
            lambda values: values["self_check"]["latents"].update(file="self_check/picture.rgb"),
            "self_check/picture.rgb has 3072 bytes",
        ),
        (lambda values: values["self_check"]["latents"].update(file="nowhere"), "nowhere is used but not in files"),
        (lambda values: values["self_check"].update(prompt=" "), "the prompt is empty"),
    ],
)
def test_records_that_do_not_fit_are_refused(
    turbopocket: Run, artifact: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewritten(artifact, change)
    ran = turbopocket("check", artifact, "--self-test")
    assert ran.code == 1
    assert words in ran.err


def test_the_self_test_is_of_this_machine(turbopocket: Run, artifact: Path) -> None:
    ran = turbopocket("check", artifact, "--self-test", "--cpu", "arm64:cortex-a76")
    assert ran.code == 1
    assert "arm64:cortex-a76 was asked with it" in ran.err
