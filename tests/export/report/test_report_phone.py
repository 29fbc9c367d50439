# SPDX-License-Identifier: Apache-2.0
"""What a report tells a mobile engineer beside bytes and parity: times, tensors, misread prompts, idle formats."""

from dataclasses import replace
from pathlib import Path

from turbopocket.export.report.page import ReportData
from turbopocket.export.report.view import page_view

from .test_report import _data, _page


def _with(data: ReportData, **values: object) -> ReportData:
    return replace(data, measurements=data.measurements.model_copy(update=values))


def test_what_the_judge_misreads_stands_under_its_picture(tmp_path: Path) -> None:
    page = _page(tmp_path, _with(_data(), misread={"artifact": [["the shape of the left or upper one"]]}))
    assert "the judge misreads <b>the shape of the left or upper one</b>" in page
    assert "the judge misreads" not in _page(tmp_path, _with(_data(), misread={"artifact": [[]]}))


def test_times_are_of_a_step_and_of_a_picture_and_name_the_machine(tmp_path: Path) -> None:
    data = _data()
    assert page_view(data).seconds is None
    assert "none was taken in a runtime that phones have" in _page(tmp_path, data)
    names = {*data.manifest.pipeline.text_encoders, "unet", data.manifest.pipeline.decoder.component}
    timed = _with(data, call_seconds=dict.fromkeys(names, 0.25), machine="A CPU, 3 cores", zipped_bytes=1_500_000)
    found = page_view(timed).seconds
    assert found is not None
    assert found.step == 0.25
    page = _page(tmp_path, timed)
    assert "On A CPU, 3 cores, in onnxruntime: 0.25 s a step" in page
    assert "deflated, is 1.50 MB" in page
    sampler = data.manifest.sampler.model_copy(update={"guidance_scale": 5.0})
    guided = replace(timed, manifest=data.manifest.model_copy(update={"sampler": sampler}))
    twice = page_view(guided).seconds
    assert twice is not None
    assert twice.step == 0.5


def test_formats_that_no_layer_got_and_the_lowest_layers_are_named(tmp_path: Path) -> None:
    recipe = '[compress]\nformats = ["int4-g32", "int8-row", "int8-g32"]\n'
    page = _page(tmp_path, replace(_data(), manifest=_data().manifest.model_copy(update={"recipe": recipe})))
    assert "no layer&#39;s best choice: int8-row." in page or "no layer's best choice: int8-row." in page
    assert "Lowest: unet.down_blocks.0.resnets.0.conv1 (21.0 dB), text_encoder.layers.0.fc1 (44.5 dB)." in page
    assert "x: float32 [batch, 4]" in page
    assert "Nothing here was measured on a phone" in page
