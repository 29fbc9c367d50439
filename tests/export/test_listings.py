# SPDX-License-Identifier: Apache-2.0
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from turbopocket.export import listings
from turbopocket.export.targets import TARGETS
from turbopocket.quant.formats import FORMATS, parse_format


def _shown(show: object, rows: object) -> str:
    console = Console(file=io.StringIO(), width=400)
    show(rows, console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_format_has_an_answer_for_every_layer_and_never_both() -> None:
    rows = listings.format_rows()
    assert len(rows) == len(listings.SAMPLE_FORMATS) * len(listings.SAMPLE_LAYERS) * len(TARGETS)
    for row in rows:
        assert (row["stored_as"] is None) == (row["bytes"] is None) == (row["reason"] is not None)
        if row["bytes"] is not None:
            assert row["bytes"] == parse_format(row["format"]).nbytes(tuple(row["shape"]))


def test_every_kind_of_format_is_listed() -> None:
    assert {type(parse_format(name)) for name in listings.SAMPLE_FORMATS} == set(FORMATS)


def test_a_no_comes_with_its_numbers() -> None:
    rows = listings.format_rows()
    for target in TARGETS:
        asked = (target.name, "int4-g32", [320, 4, 3, 3])
        (row,) = [row for row in rows if (row["target"], row["format"], row["shape"]) == asked]
        assert row["stored_as"] is None
        assert row["reason"] == "4 input channels are not a multiple of group 32 in int4-g32"


def test_one_codebook_is_for_both_targets_and_a_sum_of_them_for_onnx() -> None:
    rows = [row for row in listings.format_rows() if row["shape"] == [640, 640]]
    told = {(row["format"], row["target"]): (row["stored_as"], row["reason"]) for row in rows}
    assert told["vq8-d4", "coreml"] == ("constexpr_lut_to_dense, mul", None)
    for name in ("vq8-d4", "avq2x8-d8"):
        stored_as, reason = told[name, "onnx"]
        assert str(stored_as).startswith("CodebookLinear, or Gather, Add, MatMul")
        assert reason is None
    reason = "Core ML looks a weight up once, avq2x8-d8 adds 2 vectors"
    assert told["avq2x8-d8", "coreml"] == (None, reason)


def test_formats_are_shown_with_their_operators_and_every_reason() -> None:
    rows = listings.format_rows()
    text = _shown(listings.show_formats, rows)
    assert "MatMulNBits" in text
    for row in rows:
        assert row["format"] in text
        assert row["reason"] is None or f"no: {row['reason']}" in text


def test_models_list_the_pipeline_classes_that_load() -> None:
    rows = listings.model_rows()
    classes = [row["pipeline_class"] for row in rows["pipelines"]]
    assert classes == ["StableDiffusionXLPipeline", "StableDiffusionPipeline"]
    assert json.loads(json.dumps(rows)) == rows


def test_a_bundled_model_tells_its_weight_and_picture_size(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listings.BUNDLED, "pocket", tiny_sd)
    (row,) = listings.model_rows()["bundled"]
    assert (row["name"], row["installed"], row["family"], row["image_size_px"]) == ("pocket", True, "sd", 32)
    stored = sum(path.stat().st_size for path in tiny_sd.rglob("*.safetensors"))  # fp32, with the VAE's encoder
    assert 0.3 * stored < row["fp16_bytes"] < 0.5 * stored
    text = _shown(listings.show_models, listings.model_rows())
    assert "32 x 32 px" in text


def test_a_bundled_model_without_weights_is_said_to_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listings.BUNDLED, "pocket", tmp_path / "nowhere")
    rows = listings.model_rows()
    assert rows["bundled"][0]["installed"] is False
    assert "not in this installation" in _shown(listings.show_models, rows)
