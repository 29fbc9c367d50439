# SPDX-License-Identifier: Apache-2.0
"""Calibration by blocks and in files: the same statistics as at once, one block in memory, and none drawn twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import blockwise
from turbopocket.quant.block_inputs import BlockInputs
from turbopocket.quant.blockwise import calibrate_to_files
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.observe import Extremes, InputIdentity, InputPower, QuietestOutput, SecondMoment
from turbopocket.quant.store import StatsStore

WIDTH = 8


class Block(nn.Module):
    """Self-attention's and cross-attention's projections, and a convolution; it writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.text = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, mode: Any, *, text: Tensor, extra: dict[str, Any]) -> Tensor:
        y = self.q(x) * self.k(x) + self.text(text).mean() * (extra["scale"] or 1)
        picture = y.T.reshape(1, WIDTH, 5, 4).transpose(2, 3)  # laid out as no fresh tensor is
        x += self.conv(picture).flatten(2)[0].T
        return x


class Model(nn.Module):
    """Two blocks that read one text, with a layer before them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mode: Any = "plain"

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.mode, text=text, extra={"scale": None})
        return x

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """In another order than the one in which they run."""
        return {"unet.blocks.1": self.blocks[1], "unet.blocks.0": self.blocks[0], "unet.first": self.first}


def runs(model: Model, calls: list[int] | None = None) -> Callable[[], None]:
    def run() -> None:
        for seed in range(3):
            if calls is not None:
                calls.append(seed)
            draw = torch.Generator().manual_seed(seed)
            with torch.inference_mode():
                model(torch.randn(20, 3, generator=draw), torch.randn(7, WIDTH, generator=draw))

    return run


def in_files(model: Model, folder: Path, calls: list[int] | None = None, needed: Any = (SecondMoment,)) -> StatsStore:
    return calibrate_to_files({"unet": model}, model.by_name, runs(model, calls), needed, folder)


@pytest.mark.parametrize("mode", ["plain", object()], ids=["replayed", "block that can not be kept"])
def test_statistics_are_those_of_all_layers_at_once_to_the_bit(mode: Any, tmp_path: Path) -> None:
    model = Model()
    model.mode = mode
    expected, found = calibrate({"unet": model}, runs(model)), in_files(model, tmp_path)
    assert list(found) == list(expected)
    for name, stats in expected.items():
        moment, other = stats[SecondMoment], found[name][SecondMoment]
        assert torch.equal(moment.hessian_KK, other.hessian_KK), name
        assert moment.count == other.count
        assert stats[Extremes] == found[name][Extremes]
        assert stats[QuietestOutput] == found[name][QuietestOutput]
        assert torch.equal(stats[InputPower], found[name][InputPower])
        assert torch.allclose(stats[InputPower], moment.hessian_KK.diagonal(), rtol=1e-5)
        assert stats[InputIdentity] == found[name][InputIdentity]


def test_layers_of_all_blocks_that_read_the_same_have_one_file_and_inputs_are_gone_in_the_end(tmp_path: Path) -> None:
    stats = in_files(Model(), tmp_path)
    # Of nine layers: first, the text that both blocks read, and for each block its own input and its picture.
    assert len(list(tmp_path.glob("second_moment-*"))) == 1 + 1 + 2 * 2
    assert len(stats) == 9
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir() if path.is_dir()) == []


def test_what_no_fit_reads_is_not_collected(tmp_path: Path) -> None:
    stats = in_files(Model(), tmp_path, needed=(InputPower,))
    assert [path.name for path in tmp_path.iterdir()] == ["observed.safetensors"]
    with pytest.raises(TurbopocketError, match="second_moment-"):
        stats["unet.first"][SecondMoment]


def test_a_killed_call_goes_on_at_its_block_without_drawing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = Model(), list[int]()
    honest, blocks = BlockInputs.replay, list[str]()

    def killed(self: BlockInputs, name: str, *asked: Any) -> None:
        if len(blocks) == 1:
            raise KeyboardInterrupt
        blocks.append(name)
        honest(self, name, *asked)

    monkeypatch.setattr(BlockInputs, "replay", killed)
    with pytest.raises(KeyboardInterrupt):
        in_files(model, tmp_path / "killed", calls)
    monkeypatch.setattr(
        BlockInputs, "replay", lambda self, name, *asked: (blocks.append(name), honest(self, name, *asked))
    )
    in_files(model, tmp_path / "killed", calls)
    assert calls == [0, 1, 2]
    assert blocks == ["unet.blocks.1", "unet.blocks.0", "unet.first"]
    in_files(model, tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}


def test_a_block_that_is_fed_something_else_by_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = BlockInputs._read
    doubled = lambda self, leaf: 2 * honest(self, leaf) if "tensor" in leaf else honest(self, leaf)  # noqa: E731
    monkeypatch.setattr(BlockInputs, "_read", doubled)
    with pytest.raises(
        TurbopocketError, match=r"unet\.blocks\.1\.\w+: fed something else when its block is run by itself"
    ):
        in_files(Model(), tmp_path)


def test_no_more_than_a_blocks_moments_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    honest = calibrate

    def counted(modules: Any, run: Any, only: Any = None, kinds: Any = None) -> Any:
        if SecondMoment in kinds:
            asked.append(len(only))
        return honest(modules, run, only, kinds)

    monkeypatch.setattr(blockwise, "calibrate", counted)
    in_files(Model(), tmp_path)
    assert asked == [3, 2, 1]  # the second block finds the moment of the text
