# SPDX-License-Identifier: Apache-2.0
"""What a report tells a mobile engineer beside bytes and parity: times, tensors, misread prompts, idle formats."""

from dataclasses import replace
from pathlib import Path

from turbopocket.export.report.page import HeldOutLoss, ReportData
from turbopocket.export.report.view import page_view
from turbopocket.runtimes.manifest import ModelOrigin, RuntimeSpec

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


def test_what_was_tried_and_is_not_in_the_files_is_told_with_the_reason(tmp_path: Path) -> None:
    recipe = '[compress]\nformats = ["int4-g32", "int8-row", "int8-g32"]\n'
    data = replace(_data(), manifest=_data().manifest.model_copy(update={"recipe": recipe}))
    losses = {"unet": HeldOutLoss(before=1e-3, after=2e-3), "text_encoder": HeldOutLoss(before=2e-3, after=1e-3)}
    found = page_view(_with(data, fine_tuning=losses)).tried
    assert [line.split(":")[0] for line in found] == ["int8-row", "fine-tuning of unet"]
    assert "<li>int8-row: in this budget no layer&#39;s best choice</li>" in _page(tmp_path, data)
    assert "Tried, and not in these files" not in _page(tmp_path, _data())


def test_the_lowest_layers_and_the_tensors_are_named(tmp_path: Path) -> None:
    page = _page(tmp_path, _data())
    lowest = "Lowest: unet.down_blocks.0.resnets.0.conv1 (21.0 dB), text_encoder.layers.0.fc1 (44.5 dB)."
    assert lowest in page.replace("<wbr>", "")
    assert "x: float32 [batch, 4]" in page
    assert "Nothing here was measured on a phone" in page


def test_the_runtime_the_licence_and_the_author_are_told(tmp_path: Path) -> None:
    runtime = RuntimeSpec(
        name="ONNX Runtime",
        oldest="1.2.3",
        format={"opset": 21, "ir_version": 10},
        providers=["CPUExecutionProvider"],
        session={"enable_mem_pattern": False},
    )
    origin = ModelOrigin(name="tiny", sha256="ab" * 32, license="openrail++", author="A Person")
    told = _data().manifest.model_copy(update={"runtime": runtime, "model": origin})
    page = _page(tmp_path, replace(_data(), manifest=told))
    assert "Opened by ONNX Runtime 1.2.3 and newer (opset 21, ir_version 10); run here by CPUExecutionProvider" in page
    assert "<code>enable_mem_pattern = false</code>" in page
    assert "Licence: openrail++; author: A Person." in page
    assert "which its card does not tell" in _page(tmp_path, _data())
