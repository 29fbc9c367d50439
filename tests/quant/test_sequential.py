# SPDX-License-Identifier: Apache-2.0
"""Blocks fitted in turn to what the stored blocks before them cause, and picked up again after a kill."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import VQDM
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import CompressedSource, compressible_layers
from turbopocket.quant.observe import LayerStats, SecondMoment
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.sensitivity import hessian_loss
from turbopocket.quant.sequential import Calls, compress_in_blocks
from turbopocket.quant.store import save_weights

FORMAT = "avq2x2-d8"
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.quant.test_sequential import Chain, compressed
torch.set_num_threads(1)
done = []
def advance():
    done.append(0)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
compressed(Chain(), Path(sys.argv[1]), advance=advance)
"""


class Counting(nn.Linear):
    """Counts how often it computes."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Chain:
    """Four wide layers in a row, registered in another order than the one they run in, and their inputs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Module()
        for name in ("d", "b", "c", "a"):
            setattr(model, name, Counting(32, 32))
        model.forward = lambda x: model.d(model.c(model.b(model.a(x).tanh()).tanh()).tanh())  # type: ignore[method-assign]
        self.model, self.inputs = model, torch.randn(200, 32) * torch.logspace(0, -1, 32)
        self.layers = compressible_layers("unet", model)
        form = parse_format(FORMAT)
        choices = [Choice(name, (32, 32), FORMAT, form.nbytes((32, 32)), 0.0) for name in self.layers]
        self.plan = Plan(tuple(choices), 0, None)

    def stats(self) -> dict[str, LayerStats]:
        return calibrate({"unet": self.model}, self.run)

    def run(self) -> None:
        for call in self.calls():
            call()

    def calls(self) -> list[Callable[[], Tensor]]:
        return [partial(self.model, each) for each in self.inputs.split(100)]


def compressed(
    chain: Chain,
    folder: Path,
    calls_of: Callable[[str], Calls] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, CompressedTensor]:
    asked = {"unet": chain.model}, chain.layers, chain.layers, chain.plan, VQDM, chain.stats()
    return compress_in_blocks(*asked, calls_of or (lambda _: chain.calls()), folder, advance=advance)


def test_each_layer_is_fitted_to_the_inputs_that_stored_layers_cause(tmp_path: Path) -> None:
    chain = Chain()
    before = {name: value.clone() for name, value in chain.model.state_dict().items()}
    stored = compressed(chain, tmp_path)
    assert list(stored) == [choice.layer for choice in chain.plan.choices]
    assert all(torch.equal(value, before[name]) for name, value in chain.model.state_dict().items())
    at_once = compress(chain.layers, chain.plan, VQDM, chain.stats())
    with decompressed({"unet": chain.model}, {name: stored[name] for name in ("unet.a", "unet.b", "unet.c")}):
        seen_KK = chain.stats()["unet.d"][SecondMoment].hessian_KK
    losses = [
        hessian_loss(each.format.decompress(each) - chain.layers["unet.d"].weight.detach(), seen_KK)
        for each in (stored["unet.d"], at_once["unet.d"])
    ]
    assert losses[0] < losses[1]
    # The first to run sees what it always saw.
    assert all(torch.equal(part, at_once["unet.a"].parts[name]) for name, part in stored["unet.a"].parts.items())


def test_bytes_are_those_of_running_everything_again_for_each_block(tmp_path: Path) -> None:
    chain, stored = Chain(), compressed(Chain(), tmp_path)
    expected: dict[str, CompressedTensor] = {}
    for name in ("unet.a", "unet.b", "unet.c", "unet.d"):
        with decompressed({"unet": chain.model}, expected):
            own = tuple(choice for choice in chain.plan.choices if choice.layer == name)
            plan, layer = replace(chain.plan, choices=own), {name: chain.layers[name]}
            expected |= compress(layer, plan, VQDM, chain.stats())
    for name, each in expected.items():
        assert all(torch.equal(part, stored[name].parts[key]) for key, part in each.parts.items()), name


def test_a_block_runs_once_as_it_is_and_once_as_it_is_stored(tmp_path: Path) -> None:
    chain = Chain()
    stats, calls = chain.stats(), len(chain.calls())
    for layer in chain.layers.values():
        layer.runs = 0
    asked = {"unet": chain.model}, chain.layers, chain.layers, chain.plan, VQDM, stats
    compress_in_blocks(*asked, lambda _: chain.calls(), tmp_path)
    runs = {name: layer.runs // calls for name, layer in chain.layers.items()}
    # The first is not run for its statistics, and the last not for others.
    assert runs == {"unet.a": 1, "unet.b": 2, "unet.c": 2, "unet.d": 1}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


class InPlace(nn.Module):
    """Writes into what it is given, which is read again afterwards; gives a tuple, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x += 1.0
        return self.inner(x), x.sin()


def test_blocks_may_be_called_twice_and_write_into_what_they_are_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Module(), torch.randn(2, 200, 32)
    model.first, model.block, model.last = nn.Linear(32, 32), InPlace(), nn.Linear(32, 32)

    def forward(x: Tensor) -> Tensor:
        x = model.first(x)
        y, z = model.block(x)
        y, z = model.block(y + z)
        return model.last(x + y + z)  # type: ignore[no-any-return]

    layers = {"unet.first": model.first, "unet.block.inner": model.block.inner, "unet.last": model.last}
    blocks = {"unet.first": model.first, "unet.block": model.block, "unet.last": model.last}
    form = parse_format(FORMAT)
    plan = Plan(tuple(Choice(name, (32, 32), FORMAT, form.nbytes((32, 32)), 0.0) for name in layers), 0, None)
    model.forward = forward  # type: ignore[method-assign]
    stats = calibrate({"unet": model}, lambda: [model(x) for x in inputs])

    def calls_of(_component: str) -> Calls:
        calls = [partial(model, x) for x in inputs]
        for call in calls:  # as a drawing does
            call()
        return calls

    stored = compress_in_blocks({"unet": model}, blocks, layers, plan, VQDM, stats, calls_of, tmp_path)
    for name, before in (("unet.block.inner", ["unet.first"]), ("unet.last", ["unet.first", "unet.block.inner"])):
        own = replace(plan, choices=tuple(choice for choice in plan.choices if choice.layer == name))
        with decompressed({"unet": model}, {each: stored[each] for each in before}):
            seen = calibrate({"unet": model}, lambda: [model(x) for x in inputs])
            expected = compress({name: layers[name]}, own, VQDM, seen)[name]
        assert all(torch.equal(part, stored[name].parts[key]) for key, part in expected.parts.items()), name


def test_a_component_is_drawn_once_behind_those_that_are_stored(tmp_path: Path) -> None:
    chain, other = Chain(), Chain()
    stored_then: dict[str, list[bool]] = {}

    def stored(each: Chain) -> bool:
        return any(isinstance(layer.__dict__.get("source"), CompressedSource) for layer in each.layers.values())

    def calls_of(component: str) -> Calls:
        stored_then.setdefault(component, []).extend([stored(chain), stored(other)])
        return (chain if component == "text" else other).calls()

    layers = compressible_layers("text", chain.model) | other.layers
    form = parse_format(FORMAT)
    plan = Plan(tuple(Choice(name, (32, 32), FORMAT, form.nbytes((32, 32)), 0.0) for name in layers), 0, None)
    stats = calibrate({"text": chain.model}, chain.run) | other.stats()
    compress_in_blocks(
        {"text": chain.model, "unet": other.model}, layers, layers, plan, VQDM, stats, calls_of, tmp_path
    )
    assert stored_then == {"text": [False, False], "unet": [True, False]}


def test_killed_and_called_again_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    save_weights(whole, compressed(Chain(), tmp_path / "one"))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "two"], check=False)
    assert killed.returncode == -9
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2
    save_weights(resumed, compressed(Chain(), tmp_path / "two"))
    assert whole.read_bytes() == resumed.read_bytes()
    drawn: list[str] = []
    compressed(Chain(), tmp_path / "two", lambda name: drawn.append(name) or [])  # type: ignore[func-returns-value]
    assert drawn == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    compressed(Chain(), tmp_path)
    file = tmp_path / "001-unet.b.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(TurbopocketError, match=r"001-unet\.b\.safetensors"):
        compressed(Chain(), tmp_path)
