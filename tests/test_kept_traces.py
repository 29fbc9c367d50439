# SPDX-License-Identifier: Apache-2.0
"""What tests keep of traces is found again for the same component, and for no other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import Onnx

from .kept_traces import keeping_traces, seen, traced_anew


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.moved_by = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.linear(self.norm(x) + self.moved_by))


class Wrapped(ComponentModule):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model(latent_sample)


def component() -> Component:
    module = Wrapped("vae_decoder", Part().eval())
    return Component("vae_decoder", module, {"latent_sample": torch.zeros(2, 4, 8)}, ("sample",), role="decoder")


def other_norm(part: Part) -> None:
    nn.init.constant_(part.norm.weight, 2.0)


def other_constant(part: Part) -> None:
    part.moved_by = torch.zeros(8)


def other_setting(part: Part) -> None:
    part.norm.eps = 1e-3


def other_forward(part: Part) -> None:
    part.forward = lambda x: F.relu(part.linear(part.norm(x) + part.moved_by))  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [other_norm, other_constant, other_setting, other_forward])
def test_a_component_that_computes_something_else_is_told_apart(change: Callable[[Part], None]) -> None:
    asked = component()
    before = seen(Onnx(), asked)
    assert before == seen(Onnx(), component())
    change(asked.module.model)
    assert seen(Onnx(), asked) != before


def test_inputs_outputs_and_options_are_told_apart() -> None:
    asked = component()
    found = {
        seen(Onnx(), asked),
        seen(Onnx(OnnxOptions(accuracy_level=4)), asked),
        seen(Onnx(), replace(asked, example_inputs={"latent_sample": torch.zeros(2, 5, 8)})),
        seen(Onnx(), replace(asked, output_names=("other",))),
        seen(Onnx(), replace(asked, free={"latent_sample": {1: "rows"}})),
    }
    assert len(found) == 5


def test_what_was_kept_is_what_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, asked, traced = Onnx.trace, component(), []
    monkeypatch.setattr(Onnx, "trace", lambda target, each: traced.append(each) or honest(target, each))  # type: ignore[func-returns-value]
    with keeping_traces(tmp_path):
        first, second = Onnx().trace(asked), Onnx().trace(component())
        assert len(traced) == 1
        with traced_anew():
            Onnx().trace(asked)
    assert len(traced) == 2
    assert first.skeleton == second.skeleton
    assert first.layers == second.layers
    assert list(first.rest) == list(second.rest)
    assert all(torch.equal(first.rest[name], second.rest[name]) for name in first.rest)
