# SPDX-License-Identifier: Apache-2.0
"""Ranges as calibration saw them, and their file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.ranges import Ranges, load_ranges, save_ranges


def test_ranges_are_those_of_all_calls() -> None:
    layer = nn.Linear(3, 2)
    calls = [torch.tensor([[1.0, -5.0, 2.0]]), torch.tensor([[0.5, 4.0, 0.0]])]
    ranges = ranges_of(calibrate({"unet": layer}, lambda: [layer(x) for x in calls]))["unet"]
    outputs = torch.cat([layer(x).detach() for x in calls])
    assert ranges.input == (-5.0, 4.0)
    assert ranges.output == pytest.approx((float(outputs.min()), float(outputs.max())))
    assert ranges.input_power == pytest.approx(float(torch.cat(calls).square().mean()))
    assert ranges.quietest_output_power == pytest.approx(float(outputs.square().mean(1).min()))
    assert ranges.largest_output == pytest.approx(float(outputs.abs().max()))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    ranges = {
        "unet.conv_in": Ranges((-1.5, 0.1), (0.0, 1e-7), 0.3, 1e-9),
        "vae.a": Ranges((0.0, 2.0), (-3.0, -1.0), 2.0, 1.5),
    }
    save_ranges(tmp_path / "ranges.json", ranges)
    assert load_ranges(tmp_path / "ranges.json") == ranges


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 9, "layers": {}}',
        '{"schema_version": 1, "layers": {"a": {"input": [0], "output": [0, 1], "input_power": 1}}}',
        '{"schema_version": 1, "layers": {"a": {"input": [0, 1], "output": [0, 1]}}}',
        '{"schema_version": 1, "layers": [1]}',
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(TurbopocketError, match=r"ranges\.json: not a file of ranges"):
        load_ranges(tmp_path / "ranges.json")


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"ranges\.json: not a file of ranges: .*does not exist"):
        load_ranges(tmp_path / "ranges.json")
