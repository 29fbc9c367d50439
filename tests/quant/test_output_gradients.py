# SPDX-License-Identifier: Apache-2.0
"""Gradients that come block by block, against autograd's own over the whole model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.output_gradients import BlockTape


class Block(nn.Module):
    """Two layers, the output of the first written into, a branch that is told something by name, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor, told: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        hidden += 1.0
        hidden = torch.tanh(hidden)
        if told is not None:
            hidden = hidden * told["scale"]
        return x + self.second(hidden), hidden


class Skipping(nn.Module):
    """A skip between blocks, layers outside of all, one block that runs twice, and one whose work is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.down, self.up, self.lost = Block(), Block(), Block()
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = self.embed(t)
        skip, inner = self.down(x)
        hidden, _ = self.up(skip * 2, told={"scale": scale})
        self.lost(hidden)
        hidden, _ = self.up(hidden + inner, told={"scale": scale})
        y: Tensor = self.out(torch.cat([hidden, skip], dim=-1))
        return y


@pytest.fixture
def model() -> Skipping:
    return Skipping().eval()


def expected_gradients(
    model: nn.Module, inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[tuple[str, Tensor, list[Tensor]]]:
    """Name, input and gradients of each call, from the graph of the whole model."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def see(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            calls.append((name, arguments[0].detach().clone(), output))
            return output.clone()  # what is written into is the copy

        return hook

    hooks = [layer.register_forward_hook(see(name)) for name, layer in compressible_layers("unet", model).items()]
    y = model(*inputs)
    for hook in hooks:
        hook.remove()
    outputs = [output for _, _, output in calls]
    found = [torch.autograd.grad(y, outputs, each, retain_graph=True, materialize_grads=True) for each in vectors]
    return [(name, x, [each[index] for each in found]) for index, (name, x, _) in enumerate(calls)]


@pytest.mark.parametrize("blocks", [(), ("down", "up", "lost"), ("down",)])
@pytest.mark.parametrize("trained", [True, False])
def test_gradients_are_those_of_the_whole_model(model: Skipping, blocks: tuple[str, ...], trained: bool) -> None:
    inputs, vectors = (torch.randn(5, 6), torch.randn(5, 3)), torch.randn(3, 5, 4).unbind()
    expected = {
        (name, x.numpy().tobytes()): gradients
        for name, x, gradients in expected_gradients(model, inputs, vectors)
        if any(each.any() for each in gradients)
    }
    model.requires_grad_(trained)
    tape = BlockTape(compressible_layers("unet", model), [model.get_submodule(name) for name in blocks])
    with tape.recording():
        y = model(*inputs)
    assert len(expected) == 8
    for call in tape.backward(y, vectors):
        if blocks == () or any(each.any() for each in call.gradients):
            gradients = expected.pop((call.layer, call.x.numpy().tobytes()))
            for found, wanted in zip(call.gradients, gradients, strict=True):
                torch.testing.assert_close(found, wanted)
    assert not expected


def test_only_layers_that_are_asked_for_are_told_of(model: Skipping) -> None:
    blocks = [model.down, model.up, model.lost, model.embed]
    tape = BlockTape({"unet.up.first": model.up.first}, blocks)
    with tape.recording():
        y = model(torch.randn(5, 6), torch.randn(5, 3))
    assert [call.layer for call in tape.backward(y, [torch.randn(5, 4)])] == ["unet.up.first"] * 2


def test_output_is_that_of_the_model(model: Skipping) -> None:
    inputs = torch.randn(5, 6), torch.randn(5, 3)
    tape = BlockTape(compressible_layers("unet", model), [model.down, model.up])
    with tape.recording():
        y = model(*inputs)
    assert torch.equal(y, model(*inputs))


def test_a_block_is_let_go_of_before_the_next_one_runs(model: Skipping) -> None:
    # The one thing that makes large models fit: of all gradients, those of one block are there at a time.
    tape = BlockTape(compressible_layers("unet", model), [model.down, model.up, model.lost])
    with tape.recording():
        y = model(torch.randn(5, 6), torch.randn(5, 3))
    before = len(tape.calls)
    calls = tape.backward(y, torch.randn(1, 5, 4).unbind())
    next(calls)
    assert len(tape.calls) == before - 1


def test_model_runs_as_before_after_recording(model: Skipping) -> None:
    tape = BlockTape(compressible_layers("unet", model), [model.down])
    with pytest.raises(RuntimeError), tape.recording():
        model(torch.randn(5, 7), torch.randn(5, 3))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_input_that_is_written_into_later_is_refused() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            y: Tensor = self.second(hidden)
            hidden += 1.0
            return y + hidden

    model = Writing()
    tape = BlockTape(compressible_layers("unet", model), [])
    with tape.recording():
        y = model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="an input of a Linear was written into after it was read"):
        list(tape.backward(y, [torch.randn(2, 4)]))
