# SPDX-License-Identifier: Apache-2.0
"""Candidates inside a build: what training left is what is shipped, checked and reported, and the plan's bytes hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build import assigning
from turbopocket.export.build.build import build
from turbopocket.export.build.forecast import drawing_works, forecast
from turbopocket.export.check import check
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.registry import open_target

from ...pixart_checkpoints import write_sigma

QUIET = StageProgress(quiet=True)
BLOCKS = "transformer.transformer_blocks"
ASKED = {"count": 2, "iterations": 200, "pictures": 8}


def recipe(model: Path, candidates: dict[str, Any]) -> Any:
    """The transformer's blocks at two bits, all else in half precision."""
    halves = dict.fromkeys(("text_encoder.*", "vae_decoder.*", "transformer.*"), "fp16")
    return make_recipe(
        {
            "model": {"source": str(model)},
            "target": {"name": "onnx"},
            "compress": {"formats": ["vq4-d4"], "pin": {**halves, f"{BLOCKS}.*": "vq8-d4"}, "fit": "mse"},
            "sampler": {"steps": 3, "guidance": 1.0},
            "calibrate": {"pictures": 2},
            "parity": {"pictures": 1},
            "candidates": candidates,
        },
        "test",
    )


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sigma"
    write_sigma(folder)
    return folder


@pytest.fixture(scope="module")
def trained(sigma: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(recipe(sigma, ASKED), tmp_path_factory.mktemp("trained") / "art", progress=QUIET)


def worst(gaps: Any) -> float:
    return max(row.relative_error for row in gaps.compression.rows if row.component == "transformer")


def test_blocks_have_the_format_and_the_bytes_that_were_planned(trained: Any) -> None:
    schemes = {choice.layer: choice.scheme for choice in trained.plan.choices}
    assert {scheme for layer, scheme in schemes.items() if layer.startswith(BLOCKS)} == {"vq8-d4"}
    assert 0.98 * trained.plan.total_bytes <= trained.total_bytes <= trained.plan.total_bytes


def test_the_runtime_computes_what_the_hardened_model_computes(trained: Any) -> None:
    assert trained.gaps.failure is None
    assert max(row.relative_error for row in trained.gaps.lowering["onnxruntime"].rows) <= 1e-4


def test_check_knows_the_codes_and_the_biases(trained: Any) -> None:
    checked = check(trained.folder, QUIET)
    assert checked.failure is None
    assert worst(checked.gaps) == pytest.approx(worst(trained.gaps), rel=1e-3)


def test_the_report_tells_what_hardening_cost(trained: Any) -> None:
    told = json.loads((trained.report.parent / "measurements.json").read_text())["candidates"]
    assert list(told) == ["transformer.transformer_blocks.0", "transformer.transformer_blocks.1"]
    assert all(each["after"] < each["before"] for each in told.values())
    assert all(each["hard"] != each["soft"] for each in told.values())
    assert "Codes chosen among candidates" in trained.report.read_text()


def test_it_is_foreseen(sigma: Path) -> None:
    asked = recipe(sigma, ASKED)
    model = load_shapes(str(sigma))
    target = open_target(asked.target)
    works = drawing_works(asked, model, target)
    foreseen = forecast(asked, model, target, works)
    names = [stage.name for stage in foreseen.stages]
    assert names[names.index("compress") + 1] == "candidates"
    assert {"trace for fine-tuning", "trace again"} <= set(names)
    stage = foreseen.stages[names.index("candidates")]
    assert len(stage.step_seconds) == 2  # a step for each block
    longer = forecast(recipe(sigma, {**ASKED, "iterations": 20_000}), model, target, works)
    assert longer.stages[names.index("candidates")].seconds > 10 * stage.seconds


def test_a_second_build_reads_the_blocks_that_are_there(
    trained: Any, sigma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one for another output of the same: blocks are found by what they were made from."""
    monkeypatch.setattr(assigning, "calls_of", lambda *_: pytest.fail("drawn again"))
    again = build(
        recipe(sigma, ASKED),
        trained.folder.with_name("again"),
        progress=QUIET,
        run=trained.folder.with_name("art.run"),
    )
    assert (again.folder / "manifest.json").is_file()
    assert worst(again.gaps) == worst(trained.gaps)
