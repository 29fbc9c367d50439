# SPDX-License-Identifier: Apache-2.0
"""One build of a tiny SDXL checkpoint, end to end, and what must hold for its artifact."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.build import build
from turbopocket.export.build.manifest import expected_manifest_bytes
from turbopocket.export.build.outcome import Built
from turbopocket.export.output.owned import refuse_build
from turbopocket.export.output.staging import run_folder
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import OverBudget, ParityFailed, TurbopocketError
from turbopocket.quant.plan import Candidate, LayerChoices
from turbopocket.runtimes.manifest import load_manifest, verify

from ...kept_traces import traced_anew


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_artifact_is_within_budget_and_as_large_as_planned(built: Any) -> None:
    on_disk = bytes_on_disk(built.folder)
    assert on_disk == built.total_bytes
    assert on_disk <= built.plan.budget_bytes
    assert on_disk == pytest.approx(built.plan.total_bytes, rel=0.01)


def test_budget_bites(built: Any) -> None:
    assert {choice.scheme for choice in built.plan.choices} == {"int4-g32", "int8-g32", "fp16"}


def test_files_match_the_manifest(built: Any) -> None:
    manifest = load_manifest(built.folder)
    verify(built.folder, manifest)
    assert manifest.plan is not None
    assert manifest.plan["schemes"] == {choice.layer: choice.scheme for choice in built.plan.choices}


def test_lowering_gap_is_rounding_and_compression_gap_is_not(built: Any) -> None:
    lowering = [row.relative_error for row in built.gaps.lowering["onnxruntime"].rows]
    compression = [row.relative_error for row in built.gaps.compression.rows]
    assert max(lowering) <= 1e-4
    assert max(compression) > 1e-3
    assert {row.component for row in built.gaps.lowering["onnxruntime"].rows} == {
        "text_encoder",
        "text_encoder_2",
        "unet",
        "vae_decoder",
    }


def test_all_files_of_a_build_are_known_as_its_own(built: Any) -> None:
    with pytest.raises(TurbopocketError, match="is not empty"):
        refuse_build(built.folder, run_folder(built.folder), overwrite=False)
    refuse_build(built.folder, run_folder(built.folder), overwrite=True)


def test_report_is_one_file_that_needs_no_network(built: Any) -> None:
    page = built.report.read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_same_command_gives_the_same_files(
    built: Any, tiny_sdxl: Path, tmp_path: Path, recipe_values: dict[str, Any]
) -> None:
    recipe = make_recipe({**recipe_values, "model": {"source": str(tiny_sdxl)}}, "test")
    with traced_anew():
        again = build(recipe, tmp_path / "art", overwrite=False, progress=StageProgress(quiet=True))
    first, second = load_manifest(built.folder), load_manifest(again.folder)
    assert [entry.path for entry in first.files if entry.path.endswith(".data")]
    assert first.files == second.files


def test_a_limit_of_memory_is_told_to_runners_and_counted(
    built: Any, tiny_sdxl: Path, tmp_path: Path, recipe_values: dict[str, Any]
) -> None:
    least = max(each.peak for each in built.plan.memory.values())
    limits = {"budget": "1GB", "peak_memory": f"{least}B"}
    values = {**recipe_values, "compress": {**recipe_values["compress"], **limits}}
    recipe = make_recipe({**values, "model": {"source": str(tiny_sdxl)}}, "test")
    limited = build(recipe, tmp_path / "art", overwrite=False, progress=StageProgress(quiet=True))
    plan = load_manifest(limited.folder).plan
    assert plan is not None
    assert plan["peak_memory_bytes"] == least
    assert plan["component_peak_bytes"] == {name: each.peak for name, each in limited.plan.memory.items()}
    assert max(plan["component_peak_bytes"].values()) <= least
    assert bytes_on_disk(limited.folder) <= limited.plan.total_bytes
    assert limited.plan.predicted_loss > 0
    assert load_manifest(built.folder).plan.keys().isdisjoint({"peak_memory_bytes", "component_peak_bytes"})
    (tmp_path / "none").mkdir()
    with pytest.raises(OverBudget, match="unet is predicted to take at least"):
        build(
            make_recipe({**values, "compress": {**values["compress"], "peak_memory": "1MB"}}, "test"),
            tmp_path / "none",
            overwrite=False,
            progress=StageProgress(quiet=True),
        )


def test_runtime_that_computes_wrong_fails_the_build_and_leaves_nothing(
    tiny_sd: Path, tmp_path: Path, recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    _plant_wrong_scale(layer, monkeypatch)
    compress = {"formats": ["int8-row"], "fit": "absmax"}
    recipe = make_recipe({**recipe_values, "model": {"source": str(tiny_sd)}, "compress": compress}, "test")
    with pytest.raises(ParityFailed, match=f"first layer to diverge is {layer}"):
        build(recipe, tmp_path / "art", overwrite=False, progress=StageProgress(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["art.run"]


def _plant_wrong_scale(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the lowering write one layer's scales (or weights) a fifth too large."""
    from turbopocket.export.targets.onnx import program as target

    honest = target.lower

    def lower(traced: Any, weights: Any, folder: Path, options: Any, schemes: Any) -> Any:
        changed = dict(weights)
        if layer in changed:
            stored = changed[layer]
            part = "scale" if "scale" in stored.parts else "weight"
            parts = {**stored.parts, part: stored.parts[part] * 1.2}
            changed[layer] = type(stored)(stored.format, stored.shape, parts)
        return honest(traced, changed, folder, options, schemes)

    monkeypatch.setattr(target, "lower", lower)


def test_json_files_of_the_report_are_readable(built: Any) -> None:
    folder = built.report.parent
    for name in ("plan.json", "choices.json", "parity.json", "tradeoff.json", "measurements.json"):
        assert json.loads((folder / name).read_text())


def test_the_manifest_is_planned_for_the_longest_name_of_a_format(built: Built) -> None:
    manifest = load_manifest(built.folder)

    def planned(*formats: str) -> int:
        candidates = tuple(Candidate(text, 1, 0.0) for text in formats)
        choices = {name: LayerChoices(name, (1, 1), candidates) for name in ("unet.a", "unet.b", "unet.c")}
        return expected_manifest_bytes(manifest, choices, [], ["onnxruntime"], built.folder)

    assert planned("int4-g32", "avq3x8-d8-shared") == planned("int4-g32") + 3 * (
        len("avq3x8-d8-shared") - len("int4-g32")
    )
