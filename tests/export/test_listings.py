# SPDX-License-Identifier: Apache-2.0
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from turbopocket.export import listings
from turbopocket.export.targets.registry import default_targets
from turbopocket.quant.formats import FORMATS
from turbopocket.quant.scheme import parse_scheme


def _shown(show: object, rows: object, width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(rows, console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_format_has_an_answer_for_every_layer_and_never_both() -> None:
    rows = listings.format_rows()
    assert len(rows) == len(listings.SAMPLE_SCHEMES) * len(listings.SAMPLE_LAYERS) * len(default_targets())
    for row in rows:
        assert (row["stored_as"] is None) == (row["bytes"] is None) == (row["reason"] is not None)
        if row["bytes"] is not None:
            assert row["bytes"] == parse_scheme(row["format"]).nbytes(tuple(row["shape"]))


def test_every_kind_of_format_is_listed() -> None:
    assert {type(parse_scheme(name).weight) for name in listings.SAMPLE_SCHEMES} == set(FORMATS)


def test_a_no_comes_with_its_numbers() -> None:
    rows = listings.format_rows()
    for target in default_targets():
        asked = (target.name, "int4-g32", [320, 4, 3, 3])
        (row,) = [row for row in rows if (row["target"], row["format"], row["shape"]) == asked]
        assert row["stored_as"] is None
        assert row["reason"] == "4 input channels are not a multiple of group 32 in int4-g32"


def test_a_weight_format_is_told_with_the_activations_that_a_target_runs_it_with() -> None:
    rows = [row for row in listings.format_rows() if row["shape"] == [640, 640] and "int8-row" in row["format"]]
    told = {(row["format"], row["target"]): (row["scheme"], row["reason"]) for row in rows}
    dynamic, static = "int8-row+a8-dynamic", "int8-row+a8-static"
    for target in ("onnx", "coreml"):
        assert told["int8-row", target] == ("int8-row", None)
    for name in (dynamic, static):
        assert told[name, "coreml"] == (None, "activations beside int8-row are not rounded")
        assert told[name, "onnx"] == (name, None)
    by_step = "int8-row+a8-step"
    assert told[by_step, "onnx"] == (by_step, None)
    assert told[by_step, "coreml"] == (None, "activations beside int8-row are not rounded")
    constants = "XNNPACK's static scales are constants of a delegate: none can be looked up by the timestep"
    assert told[by_step, "executorch"] == (None, constants)
    assert len({row["stored_as"] for row in rows if row["target"] == "onnx"}) == 4
    assert told["int8-row", "executorch"] == told[dynamic, "executorch"] == (dynamic, None)
    assert told[static, "executorch"] == (static, None)
    assert len({row["stored_as"] for row in rows if row["target"] == "executorch" and row["stored_as"]}) == 2


def test_codebooks_are_for_all_targets() -> None:
    rows = [row for row in listings.format_rows() if row["shape"] == [640, 640]]
    told = {(row["format"], row["target"]): (row["stored_as"], row["reason"]) for row in rows}
    assert told["vq8-d4", "coreml"] == ("constexpr_lut_to_dense, mul", None)
    for name in ("vq8-d4", "avq2x8-d8"):
        stored_as, reason = told[name, "onnx"]
        assert str(stored_as).startswith("CodebookLinear, or Gather, Add, MatMul")
        assert reason is None
        assert str(told[name, "executorch"][0]).startswith("embedding and bmm, or turbopocket::codebook_linear")
    sums = "constexpr_lut_to_dense and a product for each codebook, add, mul"
    assert told["avq2x8-d8", "coreml"] == (sums, None)


def test_formats_are_shown_in_80_columns_each_answer_with_a_note() -> None:
    rows = listings.format_rows()
    text = _shown(listings.show_formats, rows, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    table, read_by, because = (part.splitlines() for part in text.split("\n\n")[:3])
    assert (read_by[0], because[0]) == ("yes, read by", "no, because")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    answers = {tuple(line.split()[:2]): line.split()[2:] for line in table[2:]}
    wide = _shown(listings.show_formats, rows)
    notes = {"yes": notes_of(wide, 1), "no": notes_of(wide, 2)}
    for row in rows:
        at = 2 * layers.index(row["layer"])
        answer, mark = answers[row["format"], row["target"]][at : at + 2]
        assert answer == ("no" if row["reason"] else "yes")
        note = notes[answer][mark]
        assert note == row["stored_as"] or row["reason"] in (
            note,
            f"{note} in {row['format']}",
            f"{note} for {row['format']}",
        )


def test_no_note_is_shown_twice() -> None:
    text = _shown(listings.show_formats, listings.format_rows(), 400)
    lines = [note for part in (1, 2) for note in notes_of(text, part).values()]
    assert len(lines) == len(set(lines)) < len(listings.format_rows()) / 3


def notes_of(text: str, part: int) -> dict[str, str]:
    """Text by mark of one of the lists below the table."""
    return dict(line.strip().split(maxsplit=1) for line in text.split("\n\n")[part].splitlines()[1:])


def test_models_list_the_pipeline_classes_that_load() -> None:
    rows = listings.model_rows()
    classes = [row["pipeline_class"] for row in rows["pipelines"]]
    assert classes == [
        "StableDiffusionXLPipeline",
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "Flux2KleinPipeline",
    ]
    assert [row["pipeline_class"] for row in rows["pipelines"] if row["only_planned"]] == ["Flux2KleinPipeline"]
    shown = _shown(listings.show_models, rows, 200)
    assert [line for line in shown.splitlines() if "(plan only)" in line and "Flux2KleinPipeline" in line]
    assert shown.count("(plan only)") == 1
    assert json.loads(json.dumps(rows)) == rows


def test_a_bundled_model_tells_its_weight_and_picture_size(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listings.BUNDLED, "pocket", tiny_sd)
    (row,) = [row for row in listings.model_rows()["bundled"] if row["name"] == "pocket"]
    assert (row["name"], row["installed"], row["family"], row["image_size"]) == ("pocket", True, "sd", "32x32")
    stored = sum(path.stat().st_size for path in tiny_sd.rglob("*.safetensors"))  # fp32, with the VAE's encoder
    assert 0.3 * stored < row["fp16_bytes"] < 0.5 * stored
    text = _shown(listings.show_models, listings.model_rows())
    assert "32x32 px" in text


def test_a_bundled_model_without_weights_is_said_to_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listings.BUNDLED, "pocket", tmp_path / "nowhere")
    rows = listings.model_rows()
    assert [row["installed"] for row in rows["bundled"] if row["name"] == "pocket"] == [False]
    assert "not in this installation" in _shown(listings.show_models, rows)
