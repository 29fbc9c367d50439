# SPDX-License-Identifier: Apache-2.0
"""How far temporal features turn, and to which timestep: on features whose answer is known."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.names import CallPlace
from turbopocket.quant.temporal import TemporalBlock, temporal_block
from turbopocket.quant.temporal_errors import TemporalCall, feature_errors


class Timed(nn.Module):
    """A denoiser that adds a feature of the timestep, which turns by 1e-3 a timestep, to its latents."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 4, bias=False)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep * 1e-3
        return self.conv(sample) + self.project(torch.stack([angle.sin(), angle.cos()])[None])[:, :, None, None]


def _block(model: nn.Module) -> TemporalBlock:
    inputs = {"sample": torch.zeros(1, 4, 2, 2), "timestep": torch.tensor(1.0)}
    return temporal_block("unet", model, inputs, "sample", "timestep", model)


def _errors(model: Timed, turned: float, timesteps: tuple[float, ...] = (500.0, 100.0)) -> list[tuple[float, int]]:
    """(cosine, shift) by step of a model whose quantized twin turns its feature by so many radians."""
    cosine, sine = torch.tensor(turned).cos(), torch.tensor(turned).sin()
    turn = torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])

    @contextmanager
    def quantized() -> Iterator[None]:
        hook = model.project.register_forward_pre_hook(lambda _m, args: (args[0] @ turn.T,))
        yield
        hook.remove()

    calls = [
        TemporalCall(CallPlace("unet", each, index), {"timestep": torch.tensor(each)})
        for index, each in enumerate(timesteps)
    ]
    layers = {"unet.project": model.project}
    rows = feature_errors(_block(model), model, layers, calls, "timestep", quantized if turned else nullcontext)
    assert [(row.layer, row.step, row.timestep) for row in rows] == [
        ("unet.project", index, each) for index, each in enumerate(timesteps)
    ]
    return [(row.cosine, row.shift) for row in rows]


def test_what_is_not_changed_has_no_error() -> None:
    assert _errors(Timed(), 0.0) == [(pytest.approx(1.0, abs=1e-12), 0)] * 2


@pytest.mark.parametrize(("turned", "shift"), [(0.008, 8), (-0.0019, -2), (0.0004, 0), (0.3, 64)])
def test_a_feature_is_found_at_the_timestep_that_it_was_turned_to(turned: float, shift: int) -> None:
    model = Timed()
    with torch.no_grad():
        model.project.weight.copy_(torch.eye(4)[:, :2])
    for cosine, found in _errors(model, turned):
        assert found == shift
        assert cosine == pytest.approx(float(torch.tensor(turned).double().cos()), abs=1e-6)


def test_there_is_no_timestep_below_zero() -> None:
    model = Timed()
    with torch.no_grad():
        model.project.weight.copy_(torch.eye(4)[:, :2])
    assert _errors(model, -0.1, (3.0,))[0][1] == -4  # clamped to 0, which -4 reaches as -64 does


def test_the_worst_of_several_calls_is_told() -> None:
    model = Timed()
    layers, block = {"unet.project": model.project}, _block(model)
    seen = []

    @contextmanager
    def quantized() -> Iterator[None]:
        hook = model.project.register_forward_hook(
            lambda _m, _i, y: seen.append(0) or (y if len(seen) == 1 else torch.zeros_like(y))  # type: ignore[func-returns-value]
        )
        yield
        hook.remove()

    calls = [TemporalCall(CallPlace("unet", 9.0, 0), {"timestep": torch.tensor(each)}) for each in (9.0, 10.0)]
    (row,) = feature_errors(block, model, layers, calls, "timestep", quantized)
    assert (row.cosine, row.relative_error) == (0.0, 1.0)
