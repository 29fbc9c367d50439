# SPDX-License-Identifier: Apache-2.0
"""Blocks fitted in turn to what the stored blocks before them cause, and picked up again after a kill."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.compress import compress, decompressed
from turbopocket.quant.fit import VQDM
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import LayerStats, SecondMoment
from turbopocket.quant.plan import Choice, Plan
from turbopocket.quant.sensitivity import hessian_loss
from turbopocket.quant.sequential import compress_in_blocks
from turbopocket.quant.store import save_weights

FORMAT = "avq2x2-d8"
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.quant.test_sequential import Chain, compressed
torch.set_num_threads(1)
chain = Chain()
calls = []
def run():
    calls.append(0)
    if len(calls) == 3:  # the first is the float model's; two blocks are done
        os.kill(os.getpid(), signal.SIGKILL)
    return chain.model(chain.inputs)
compressed(chain, Path(sys.argv[1]), run)
"""


class Chain:
    """Four wide layers in a row, registered in another order than the one they run in, and their inputs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Module()
        for name in ("d", "b", "c", "a"):
            setattr(model, name, nn.Linear(32, 32))
        model.forward = lambda x: model.d(model.c(model.b(model.a(x).tanh()).tanh()).tanh())  # type: ignore[method-assign]
        self.model, self.inputs = model, torch.randn(200, 32) * torch.logspace(0, -1, 32)
        self.layers = compressible_layers("unet", model)
        form = parse_format(FORMAT)
        choices = [Choice(name, (32, 32), FORMAT, form.nbytes((32, 32)), 0.0) for name in self.layers]
        self.plan = Plan(tuple(choices), 0, None)

    def stats(self, run: Callable[[], object] | None = None) -> dict[str, LayerStats]:
        return calibrate({"unet": self.model}, run or self.run)

    def run(self) -> Tensor:
        output: Tensor = self.model(self.inputs)
        return output


def compressed(chain: Chain, folder: Path, run: Callable[[], object] | None = None) -> dict[str, CompressedTensor]:
    run = run or chain.run
    asked = {"unet": chain.model}, chain.layers, chain.plan, VQDM, chain.stats(run)
    return compress_in_blocks(*asked, lambda name: name, run, folder)


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


def test_killed_and_called_again_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    save_weights(whole, compressed(Chain(), tmp_path / "one"))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "two"], check=False)
    assert killed.returncode == -9
    assert len(list((tmp_path / "two").iterdir())) == 2
    calls = []
    chain = Chain()

    def run() -> Tensor:
        calls.append(0)
        return chain.run()

    save_weights(resumed, compressed(chain, tmp_path / "two", run))
    assert len(calls) == 3  # the float model, and two blocks, not four
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    compressed(Chain(), tmp_path)
    file = sorted(tmp_path.iterdir())[1]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(TurbopocketError, match=r"001-unet\.b\.safetensors"):
        compressed(Chain(), tmp_path)
