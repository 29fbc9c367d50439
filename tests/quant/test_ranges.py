# SPDX-License-Identifier: Apache-2.0
"""Ranges as calibration saw them, and their file."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.names import at_place
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.layer_rounding import Rounding
from turbopocket.quant.observe import Extremes
from turbopocket.quant.ranges import Ranges, StepRange, load_ranges, save_ranges
from turbopocket.quant.rounding import StepQParams
from turbopocket.quant.scheme import parse_scheme

STEPS = {799.0: 8.0, 400.0: 1.0, 10.0: 0.5}
"""How large inputs are at each timestep."""


@pytest.fixture(scope="module")
def stepped() -> tuple[nn.Linear, Ranges]:
    """A layer that was called at each timestep for two pictures with a prompt and, in a range of its own, without."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)

    def run() -> None:
        layer(torch.full((1, 3), 0.1))  # no timestep
        for picture in range(2):
            for timestep, size in STEPS.items():
                for guided in (True, False):
                    with at_place(timestep=timestep, guided=guided, picture=picture):
                        layer(size * torch.tensor([[1.0, 0.5, -0.25]]) * (1 if guided else -1))

    return layer, ranges_of(calibrate({"unet": layer}, run, kinds=None))["unet"]


def test_ranges_of_a_step_are_those_of_its_calls_with_a_prompt_and_without(stepped: tuple[nn.Linear, Ranges]) -> None:
    _, ranges = stepped
    assert [step.timestep for step in ranges.steps] == list(STEPS)
    assert [step.input for step in ranges.steps] == [(-size, size) for size in STEPS.values()]
    assert [step.calls for step in ranges.steps] == [2, 2, 2]
    assert ranges.input == (-8.0, 8.0)
    assert ranges.output[0] == min(step.output[0] for step in ranges.steps)
    assert len({step.output for step in ranges.steps}) == 3


def test_a_call_has_the_range_of_the_nearest_step(stepped: tuple[nn.Linear, Ranges]) -> None:
    layer, ranges = stepped
    found = StepQParams.of(ranges)
    assert found.at(799.0).input.scale == pytest.approx(16 / 255)
    assert found.at(601.0).input == found.at(599.6).input == found.at(799.0).input != found.at(599.0).input
    rounding = Rounding.of("unet", parse_scheme("fp32+a8-step+float"), {"unet": ranges})
    x = torch.tensor([[0.3, -0.2, 0.123]])
    errors = [float((rounding.of_input(layer, x, each) - x).abs().max()) for each in (799.0, 400.0, 10.0)]
    assert errors[0] > 3 * errors[1] > 3 * errors[2] > 0
    assert torch.equal(rounding.of_input(layer, x), rounding.of_input(layer, x, 799.0)), "one range of all calls"
    with at_place(timestep=10.0):
        assert torch.equal(rounding.of_input(layer, x), rounding.of_input(layer, x, 10.0)), "the place of the call"


def test_what_rounding_changes_is_told_for_each_row_by_its_timestep(stepped: tuple[nn.Linear, Ranges]) -> None:
    layer, ranges = stepped
    x, timesteps = torch.tensor([[0.3, -0.2, 0.123]]).repeat(3, 1), list(STEPS)
    for scheme in ("fp32+a8-step", "fp32+a8-step+float"):
        rounding = Rounding.of("unet", parse_scheme(scheme), {"unet": ranges})
        found = rounding.changed(layer, layer.weight, x, timesteps)
        for row, timestep in enumerate(timesteps):
            expected = rounding.changed(layer, layer.weight, x[:1], [timestep])
            assert torch.equal(found[row : row + 1], expected)
        assert not torch.equal(found[0], found[2])


def test_steps_come_back_from_a_file_of_statistics(stepped: tuple[nn.Linear, Ranges]) -> None:
    layer, _ = stepped
    stats = calibrate({"unet": layer}, lambda: _at_a_step(layer), kinds=[Extremes])
    value = stats["unet"][Extremes]
    assert value.steps
    assert Extremes.unpacked(Extremes.packed(value)) == value
    without = calibrate({"unet": layer}, lambda: layer(torch.ones(1, 3)), kinds=[Extremes])["unet"][Extremes]
    assert without.steps == ()
    assert Extremes.unpacked(Extremes.packed(without)) == without


def _at_a_step(layer: nn.Linear) -> None:
    with at_place(timestep=5.0):
        layer(torch.ones(1, 3))


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
        "unet.b": Ranges((0.0, 2.0), (-3.0, -1.0), 2.0, 1.5, (StepRange(799.0, (0.0, 1.0), (-3.0, 0.5), 24),)),
    }
    save_ranges(tmp_path / "ranges.json", ranges)
    assert load_ranges(tmp_path / "ranges.json") == ranges


def test_ranges_of_schema_1_have_no_steps(tmp_path: Path) -> None:
    seen = {"unet.conv_in": Ranges((-1.5, 0.1), (0.0, 1e-7), 0.3, 1e-9)}
    file = tmp_path / "ranges.json"
    save_ranges(file, seen)
    values = json.loads(file.read_text())
    del values["layers"]["unet.conv_in"]["steps"]
    file.write_text(json.dumps({**values, "schema_version": 1}))
    assert load_ranges(file) == seen


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
