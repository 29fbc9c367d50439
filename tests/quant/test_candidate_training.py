# SPDX-License-Identifier: Apache-2.0
"""Candidates trained block by block: what is lower afterwards, what goes on after a stop, and what is left alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import candidate_training
from turbopocket.quant.candidate_training import train_block, train_in_blocks, trained_blocks
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.options import CandidateOptions

OPTIONS = CandidateOptions(count=2, iterations=60, learning_rate=2e-3)
FORMATS = {"first.up": "vq4-d4", "first.down": "vq4-d4", "second.up": "avq2x3-d4", "second.down": "int4-g32"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x) + told))


class Model(nn.Module):
    """Two blocks between two layers, the last of which stays float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin, self.end = nn.Linear(8, 32), nn.Linear(32, 4)
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        told = x.mean(-1, keepdim=True)
        return self.end(self.second(self.first(self.begin(x), told), told=told))


@pytest.fixture
def model() -> Model:
    return Model().eval()


def asked(model: Model) -> dict[str, Any]:
    layers = compressible_layers("unet", model)
    weights = {
        name: parse_format(FORMATS.get(name.removeprefix("unet."), "fp16")).compress(layer.weight.detach(), MSE)
        for name, layer in layers.items()
    }
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 8, generator=random) for _ in range(24)]

    def calls_of(component: str) -> list[Callable[[], object]]:
        assert component == "unet"
        with torch.no_grad():
            for each in inputs:
                model(each)
        return [partial(model, each) for each in inputs]

    return {
        "modules": {"unet": model},
        "blocks": {f"unet.{name}": model.get_submodule(name) for name in ("begin", "first", "second", "end")},
        "layers": layers,
        "weights": weights,
        "order": [f"unet.{name}" for name in ("begin", *FORMATS, "end")],
        "calls_of": calls_of,
    }


def trained(model: Model, folder: Path, options: CandidateOptions = OPTIONS, **values: Any) -> Any:
    return train_in_blocks(**{**asked(model), **values}, options=options, folder=folder)


def same(a: dict[str, CompressedTensor], b: dict[str, CompressedTensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].parts.keys() == b[name].parts.keys()
        and all(torch.equal(a[name].parts[part], b[name].parts[part]) for part in a[name].parts)
        for name in a
    )


def error(model: Model, weights: dict[str, CompressedTensor]) -> float:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = model(x)
        with decompressed({"unet": model}, weights):
            found = model(x)
    return float((found - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("schedule", ["joint", "freeze"])
@pytest.mark.parametrize("start", ["equal", "distance"])
def test_the_model_is_closer_to_the_float_one_at_the_same_bytes(
    model: Model, tmp_path: Path, schedule: Any, start: Any
) -> None:
    before = asked(model)["weights"]
    options = replace(OPTIONS, schedule=schedule, start=start)
    after, losses = trained(model, tmp_path, options)
    assert error(model, after) < 0.7 * error(model, before)
    assert sum(after[name].nbytes for name in before) == sum(each.nbytes for each in before.values())
    assert list(losses) == ["unet.first", "unet.second"]
    assert all(each.after < each.before for each in losses.values())
    assert (after["unet.first.up"].parts["codes"] != before["unet.first.up"].parts["codes"]).any()
    assert same({"": after["unet.second.down"]}, {"": before["unet.second.down"]})
    assert "unet.first.up.bias" in after
    assert "unet.second.down.bias" not in after


def test_what_is_reported_at_the_end_is_what_the_artifact_s_weights_give(model: Model, tmp_path: Path) -> None:
    after, losses = trained(model, tmp_path)
    inputs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(1))]
    assert len(inputs) == 1
    given = asked(model)
    with torch.no_grad(), decompressed({"unet": model}, {name: after[name] for name in after if "first" in name}):
        calls = given["calls_of"]("unet")
        hard = [model.first(model.begin(each.args[0]), each.args[0].mean(-1, keepdim=True)) for each in calls]
    with torch.no_grad():
        wanted = [model.first(model.begin(each.args[0]), each.args[0].mean(-1, keepdim=True)) for each in calls]
    held_out = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:3]
    found = [float((hard[i] - wanted[i]).square().sum() / wanted[i].square().sum()) for i in held_out]
    # The layer before the block is stored in fp16, which is all that tells the two apart.
    assert sum(found) / 3 == pytest.approx(losses["unet.first"].after, rel=1e-2)


def test_one_candidate_trains_codebooks_and_biases_alone(model: Model, tmp_path: Path) -> None:
    before = asked(model)["weights"]
    after, losses = trained(model, tmp_path, replace(OPTIONS, count=1))
    for name in ("unet.first.up", "unet.second.up"):
        assert torch.equal(after[name].parts["codes"], before[name].parts["codes"])
        assert not torch.equal(after[name].parts["scale"], before[name].parts["scale"])
    assert losses["unet.first"].soft == losses["unet.first"].hard == losses["unet.first"].before


def test_a_stopped_run_goes_on_to_the_same_bytes(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(model, tmp_path / "whole")
    seen: list[str] = []

    def stopping(name: str, *arguments: Any) -> Any:
        seen.append(name)
        if name == "unet.second" and seen.count(name) == 1:
            raise KeyboardInterrupt
        return train_block(name, *arguments)

    monkeypatch.setattr(candidate_training, "train_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path / "stopped")
    resumed = trained(model, tmp_path / "stopped")
    assert seen == ["unet.first", "unet.second", "unet.second"]
    assert same(resumed[0], whole[0])
    assert resumed[1] == whole[1]
    kept = [f"00{kind}-unet.{block}.safetensors" for kind in (0, 1) for block in ("first", "second")]
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == kept


def test_the_model_keeps_its_own_weights(model: Model, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_second_block_is_fed_what_the_stored_first_gives(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: dict[str, Tensor] = {}

    def watching(name: str, block: nn.Module, floats: Any, weights: Any, calls: Any, *rest: Any) -> Any:
        fed[name] = calls[0][0][0]
        return train_block(name, block, floats, weights, calls, *rest)

    monkeypatch.setattr(candidate_training, "train_block", watching)
    after, _ = trained(model, tmp_path)
    first = asked(model)["calls_of"]("unet")[0].args[0]
    with torch.no_grad(), decompressed({"unet": model}, {name: after[name] for name in after if "first" in name}):
        stored = model.first(model.begin(first), first.mean(-1, keepdim=True))
    with torch.no_grad():
        floats = model.first(model.begin(first), first.mean(-1, keepdim=True))
    assert (fed["unet.second"] - stored).norm() < 0.05 * (fed["unet.second"] - floats).norm()


def test_blocks_without_codebooks_are_not_trained(model: Model) -> None:
    given = asked(model)
    assert trained_blocks(given["blocks"], given["weights"], given["order"]) == ["unet.first", "unet.second"]


def test_one_call_is_too_few(model: Model, tmp_path: Path) -> None:
    calls = asked(model)["calls_of"]("unet")[:1]
    with pytest.raises(TurbopocketError, match="unet.first: training candidates needs 2 recorded calls or more"):
        trained(model, tmp_path, calls_of=lambda component: calls)


def test_a_loss_that_is_no_number_stops_it(model: Model, tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match="unet.first: the loss is .* training candidates"):
        trained(model, tmp_path, replace(OPTIONS, learning_rate=1e30))


def test_a_block_that_did_not_get_better_stays_as_it_was_stored(model: Model, tmp_path: Path) -> None:
    given = asked(model)
    after, losses = trained(model, tmp_path, replace(OPTIONS, iterations=2, learning_rate=1.0))
    assert all(each.after > each.before for each in losses.values())
    assert same(after, given["weights"])
