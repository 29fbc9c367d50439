# SPDX-License-Identifier: Apache-2.0
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from turbopocket.export.output.staging import report_folder
from turbopocket.export.report.page import (
    DrawnPicture,
    Measurements,
    ReportData,
    TradeoffPoint,
    write_report,
)
from turbopocket.export.report.rewrite import rewrite_report
from turbopocket.export.report.svg import linear_scale, log_scale, scientific
from turbopocket.export.report.view import block_bars, component_bars, format_classes, page_view
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.peak import ComponentMemory
from turbopocket.quant.plan import Choice, Plan
from turbopocket.runtimes.compare.rows import Divergence, Limits, ParityReport, ParityRow, PictureRow
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import (
    ComponentSpec,
    FileEntry,
    ImageSpec,
    Manifest,
    TensorSpec,
    write_manifest,
)
from turbopocket.runtimes.memory import MemoryFigures
from turbopocket.runtimes.schedule import SamplerSpec

from ...pipelines import of_one_graph

PROMPT = 'a red <b>circle</b> & "a star"'
TIMESTEPS = (999.0, 499.0)
NO_LIMITS = Limits(max_relative_error=math.inf)


def _row(component: str, timestep: float | None, error: float, limit: float) -> ParityRow:
    return ParityRow(
        picture=0,
        component=component,
        timestep=timestep,
        output="out",
        max_abs_error=error,
        relative_error=error,
        snr_db=20.0,
        max_relative_error=limit,
    )


def _rows(error: float, limit: float) -> list[ParityRow]:
    unet = [_row("unet", timestep, error, limit) for timestep in TIMESTEPS]
    return [_row("text_encoder", None, error, limit), *unet]


def _png(gray: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (64, 64), gray).save(file, "PNG")
    return file.getvalue()


def _manifest() -> Manifest:
    tensors = [TensorSpec(name="x", dtype="float32", shape=["batch", 4])]
    names = ("text_encoder", "unet")
    return Manifest(
        name="tiny",
        family="sd",
        target="onnx",
        files=[FileEntry(path=f"{name}/model.onnx", bytes=1_000_000, sha256="ab" * 32) for name in names]
        + [FileEntry(path="tokenizer/tokenizer.json", bytes=5_000, sha256="cd" * 32)],
        components={name: ComponentSpec(file=f"{name}/model.onnx", inputs=tensors, outputs=tensors) for name in names},
        tokenizers={"text_encoder": "tokenizer"},
        pipeline=of_one_graph("unet", "x", "x"),
        sampler=SamplerSpec(
            kind="euler",
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            steps=2,
            guidance_scale=0.0,
        ),
        image=ImageSpec(
            height=64,
            width=64,
            latent_channels=4,
            latent_height=16,
            latent_width=16,
            vae_scaling_factor=0.5,
        ),
        sizes=[ImageSize(64, 64)],
        tools={"torch": "2.13.0"},
        recipe="seed = 0\n",
    )


def _data() -> ReportData:
    choices = (
        Choice("text_encoder.layers.0.fc1", (64, 64), "int8-g32", 4_352, 1e-4),
        Choice("unet.down_blocks.0.resnets.0.conv1", (64, 64, 3, 3), "int4-g32", 20_736, 2e-3),
        Choice("unet.down_blocks.0.resnets.0.conv2", (64, 64, 3, 3), "fp16", 73_728, 0.0),
    )
    plan = Plan(choices, 1_000, 3_000_000, {"unet": ComponentMemory(3 * 2**20, 5 * 2**19)})
    picture = PictureRow(picture=0, prompt=PROMPT, seed=7, psnr_db=27.25, ssim=0.9, feature_distance=0.125)
    measurements = Measurements(
        artifact_bytes=2_015_000,
        parameters=3_000_000,
        layer_snr_db={choices[0].layer: 44.5, choices[1].layer: 21.0, choices[2].layer: None},
        compression=ParityReport(limits=NO_LIMITS, rows=_rows(0.04, math.inf), pictures=[picture]),
        total=ParityReport(limits=NO_LIMITS, rows=[], pictures=[picture]),
        alignment={"float_model": 1.0, "stored": None, "artifact": 0.0},
        to_diffusers=2.5e-6,
        memory={"unet": MemoryFigures(1, 2**20, 2 * 2**20, 1, 1, 1, 0, 4 * 2**20, 1_000_000)},
        stage_seconds={"load": 1.5},
    )
    return ReportData(
        manifest=_manifest(),
        plan=plan,
        tradeoff=tuple(TradeoffPoint(10**6 * size, 10**6 * size, 10.0**-size) for size in (2, 3, 4)),
        parity={"onnxruntime": ParityReport(limits=Limits(), rows=_rows(2e-6, 1e-4), pictures=[picture])},
        measurements=measurements,
        pictures=(DrawnPicture(PROMPT, _png(10), _png(20), _png(30)),),
    )


def _failed(data: ReportData) -> ReportData:
    first = Divergence(
        component="unet", timestep=499.0, layer="conv_in", relative_error=math.inf, max_abs_error=math.inf
    )
    rows = [*_rows(2e-6, 1e-4), _row("unet", 499.0, 0.25, 1e-4)]
    failed = ParityReport(limits=Limits(), rows=rows, pictures=[], first_divergence=first)
    return replace(data, parity={"onnxruntime": failed})


def _page(folder: Path, data: ReportData) -> str:
    return write_report(folder, data).read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Collects every attribute, and fails on a tag that is closed twice, never, or in the wrong order."""

    VOID = ("meta", "img", "wbr", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A manifest and, beside it, everything a build leaves for its report."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    data = _data()
    write_manifest(folder, data.manifest)
    data.save(report_folder(folder))
    return folder


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = _page(tmp_path, _data())
    parsed = _Balance()
    parsed.feed(page)
    assert parsed.open == []
    assert not parsed.tags & {"script", "link", "iframe", "base", "object"}
    links = [value for name, value in parsed.values if name in ("src", "href", "srcset", "data")]
    assert len(links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?://", page)


def test_text_from_outside_is_shown_as_text(tmp_path: Path) -> None:
    page = _page(tmp_path, _data())
    assert "<b>circle</b>" not in page
    assert page.count("a red &lt;b&gt;circle&lt;/b&gt; &amp; &#34;a star&#34;") == 3


def test_a_layer_name_in_a_tooltip_is_shown_as_text(tmp_path: Path) -> None:
    data = _data()
    odd = replace(data.plan.choices[0], layer="unet.<script>")
    snr_db = {"unet.<script>": 1.0} | {choice.layer: 20.0 for choice in data.plan.choices[1:]}
    measurements = data.measurements.model_copy(update={"layer_snr_db": snr_db})
    plan = replace(data.plan, choices=(odd, *data.plan.choices[1:]))
    assert "<script>" not in _page(tmp_path, replace(data, plan=plan, measurements=measurements))


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    assert _page(tmp_path, _data()) == _page(tmp_path, _data())


def test_the_headline_compares_shipped_bytes_with_budget_and_float(tmp_path: Path) -> None:
    page = _page(tmp_path, _data())
    assert "67.2 % of the budget of 3.00 MB" in page
    assert "3.0&thinsp;&times; smaller" in page  # 2 bytes x 3,000,000 parameters / 2,015,000 bytes
    assert "6.0&thinsp;&times; than in fp32 (12.00 MB)" in page
    assert "Parity passed" in page


def test_memory_is_shown_as_measured_and_as_predicted(tmp_path: Path) -> None:
    row = re.search(r'<tr><th scope="row">unet</th><td class="n">1.0<.*?</tr>', _page(tmp_path, _data()), re.DOTALL)
    assert row is not None
    cells = re.findall(r'<td class="n">([^<]*)</td>', row[0])
    assert cells[-3:] == ["4.0", "4.0", "5.5"]  # peak, of it the component's own, predicted


def test_a_failed_parity_names_the_layer_and_shows_the_stored_weights_pictures(tmp_path: Path) -> None:
    page = _page(tmp_path, _failed(_data()))
    assert "Parity failed" in page
    assert "unet at timestep 499: relative error 0.25 is over 0.0001" in page
    assert "unet.conv_in" in page
    assert page.count("data:image/png") == 3


def test_shipped_bytes_by_folder_add_up_to_the_artifact() -> None:
    bars = component_bars(_data())
    assert [bar.label for bar in bars] == ["text_encoder", "unet", "manifest.json", "tokenizer"]
    assert sum(bar.bytes for bar in bars) == 2_015_000
    assert sum(bar.percent for bar in bars) == pytest.approx(100)


def test_blocks_split_their_bytes_by_format() -> None:
    plan = _data().plan
    encoder, block = block_bars(plan, format_classes(plan))
    assert (encoder.label, block.label) == ("text_encoder.layers.0", "unet.down_blocks.0")
    assert [(piece.label, piece.bytes) for piece in block.segments] == [("int4-g32", 20_736), ("fp16", 73_728)]
    assert sum(piece.percent for piece in block.segments) == pytest.approx(100)


def test_formats_are_ordered_by_bits_and_count_scales() -> None:
    rows = page_view(_data()).formats
    assert [row.scheme for row in rows] == ["int4-g32", "int8-g32", "fp16"]
    assert [row.bits_per_weight for row in rows] == [4.5, 8.5, 16.0]


def test_both_gaps_stand_in_one_row_and_the_worst_picture_counts() -> None:
    rows = page_view(_failed(_data())).gaps
    assert [(row.component, row.timestep) for row in rows] == [
        ("text_encoder", None),
        ("unet", 999.0),
        ("unet", 499.0),
    ]
    assert [row.lowering[0].error for row in rows] == [2e-6, 2e-6, 0.25]
    assert [row.compression_error for row in rows] == [0.04] * 3
    assert [row.passed for row in rows] == [True, True, False]


def test_each_runtime_has_a_column_and_the_one_that_fails_is_named(tmp_path: Path) -> None:
    data = _data()
    passed = data.parity["onnxruntime"]
    slow = ParityReport(limits=Limits(max_relative_error=0.1), rows=_rows(0.5, 0.1), pictures=[])
    failed = replace(data, parity={"fp32": passed, "acc16": slow})
    rows = page_view(failed).gaps
    assert [[each.error for each in row.lowering] for row in rows] == [[2e-6, 0.5]] * 3
    assert not any(row.passed for row in rows)
    page = _page(tmp_path, failed)
    assert "lowering gap, fp32" in page
    assert "lowering gap, acc16" in page
    assert "acc16: text_encoder: relative error 0.5 is over 0.1" in page


def test_errors_of_zero_and_infinity_can_be_plotted(tmp_path: Path) -> None:
    rows = [_row("unet", 999.0, 0.0, 1e-4), _row("unet", 499.0, math.inf, 1e-4)]
    page = _page(tmp_path, replace(_data(), parity={"x86": ParityReport(limits=Limits(), rows=rows, pictures=[])}))
    assert "timestep 999: lowering gap 0" in page
    assert "timestep 499: lowering gap ∞" in page
    assert not re.search(r'="(nan|inf|-inf)', page)


def test_a_build_without_budget_and_without_judge_has_a_page(tmp_path: Path) -> None:
    data = _data()
    nobody = dict.fromkeys(data.measurements.alignment, None)
    measurements = data.measurements.model_copy(update={"alignment": nobody})
    page = _page(tmp_path, replace(data, plan=replace(data.plan, budget_bytes=None), measurements=measurements))
    assert "no budget was set" in page
    assert "trained judge" not in page


def test_pictures_that_show_their_prompt_are_counted_by_who_drew_them(tmp_path: Path) -> None:
    page = _page(tmp_path, _data())
    assert re.search(r"float <b>1 of 1</b>,\s*artifact <b>0 of 1</b>\.", page)


def test_saved_data_loads_as_it_was(tmp_path: Path) -> None:
    for data in (_data(), _failed(_data())):
        data.save(tmp_path)
        assert ReportData.load(tmp_path, data.manifest) == data


def test_a_report_is_written_again_from_the_files_of_the_build(artifact: Path) -> None:
    first = _page(report_folder(artifact), _data())
    path = rewrite_report(artifact)
    assert path == report_folder(artifact) / "report.html"
    assert path.read_text(encoding="utf-8") == first


@pytest.mark.parametrize(
    "name",
    [
        *("plan.json", "tradeoff.json", "parity.json", "measurements.json", "pictures/prompts.json"),
        *("pictures/00.float.png", "pictures/00.stored.png", "pictures/00.artifact.png"),
    ],
)
@pytest.mark.parametrize("damage", [None, b"", b"\xff\xfe", b'{"half'])
def test_a_missing_or_damaged_file_is_named(artifact: Path, name: str, damage: bytes | None) -> None:
    file = report_folder(artifact) / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    expected = "can not be read: No such file" if damage is None else ""
    with pytest.raises(TurbopocketError, match=re.escape(str(file)) + ".*" + expected) as caught:
        rewrite_report(artifact)
    assert caught.value.hint == "build again"


def test_files_of_two_builds_do_not_make_one_report(artifact: Path) -> None:
    file = report_folder(artifact) / "measurements.json"
    values = json.loads(file.read_text())
    del values["layer_snr_db"]["text_encoder.layers.0.fc1"]
    file.write_text(json.dumps(values))
    with pytest.raises(TurbopocketError, match=r"differ in 1 layers, text_encoder\.layers\.0\.fc1 first"):
        rewrite_report(artifact)


def test_an_artifact_without_its_report_folder_is_refused(artifact: Path) -> None:
    report_folder(artifact).rename(artifact.parent / "elsewhere")
    with pytest.raises(TurbopocketError, match=r"has no measurements: .*artifact\.report is missing"):
        rewrite_report(artifact)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.34e-6, "2.3\u202f\u00d7\u202f10⁻⁶"), (1.0, "1.0\u202f\u00d7\u202f10⁰"), (math.inf, "∞")],
)
def test_errors_are_written_with_two_digits(value: float, text: str) -> None:
    assert scientific(value) == text


def test_a_log_axis_ends_at_whole_decades_and_holds_its_values() -> None:
    scale = log_scale([0.0, 3e-6, 0.04, math.inf], 0.0, 100.0)
    assert (scale.low, scale.high) == pytest.approx((1e-6, 0.1))
    assert scale.ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert scale(0.0) == 0.0
    assert scale(math.inf) == 100.0
    assert scale(1e-3) == pytest.approx(60.0)


def test_a_linear_axis_has_round_ticks_and_holds_its_values() -> None:
    scale = linear_scale([0.0, 73.6], 0.0, 100.0)
    assert (scale.low, scale.high) == (0.0, 80.0)
    assert scale.ticks() == pytest.approx([0.0, 20.0, 40.0, 60.0, 80.0])


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [-3.0, 3.0]])
def test_any_values_make_an_axis_of_some_length(values: list[float]) -> None:
    for scale in (linear_scale(values, 0.0, 100.0), log_scale(values, 0.0, 100.0)):
        assert scale.low < scale.high
