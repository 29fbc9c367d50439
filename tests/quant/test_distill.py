# SPDX-License-Identifier: Apache-2.0
"""Distillation: the walk, the noise arithmetic, the losses, and a run that is killed and goes on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor, nn

from turbopocket.quant.distill.diffusion import Diffusion
from turbopocket.quant.distill.options import Devices, DistillOptions
from turbopocket.quant.distill.steps import FixedIntervals
from turbopocket.quant.distill.tdm import Point, draw_tau, fake_loss, importance, student_loss, student_point
from turbopocket.quant.distill.trainer import Networks, Task, distill, tdm_update
from turbopocket.quant.errors import QuantError

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def diffusion() -> Diffusion:
    return Diffusion(DDIMScheduler(**SCHEDULE).alphas_cumprod)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", range(1, 9))
def test_a_walk_goes_where_diffusers_ddim_goes(count: int) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(count)
    walk = FixedIntervals(1000, [count]).walk(count)
    assert [step.start for step in walk] == scheduler.timesteps.tolist()
    x_t = torch.randn(1, 4, 2, 2, generator=seeded(0))
    ours, process = x_t, diffusion()
    for step in walk:
        output = torch.sin(x_t)
        x_t = scheduler.step(output, step.start, x_t).prev_sample
        start, end = torch.tensor([step.start]), torch.tensor([step.end])
        ours = process.mixed(*process.clean_and_noise(ours, torch.sin(ours), start), end)
        assert torch.allclose(ours, x_t, atol=1e-4)
        ours = x_t


@pytest.mark.parametrize("counts", [[0], [9], []])
def test_step_counts_outside_1_to_8_are_refused(counts: list[int]) -> None:
    with pytest.raises(QuantError, match="allowed are 1 to 8"):
        FixedIntervals(1000, counts)


def test_noising_in_two_stages_is_noising_once() -> None:
    process, count = diffusion(), 200_000
    x_0 = torch.full((count, 1), 0.7)
    half, late = torch.full((count,), 300), torch.full((count,), 800)
    x_s = process.mixed(x_0, torch.randn(count, 1, generator=seeded(0)), half)
    x_t = process.diffused(x_s, half, late, torch.randn(count, 1, generator=seeded(1)))
    signal, spread = process.shares(late, x_0)
    assert x_t.mean().item() == pytest.approx(0.7 * signal[0].item(), abs=0.01)
    assert x_t.std().item() == pytest.approx(spread[0].item(), rel=0.01)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_prediction_is_read_back_into_clean_and_noise(prediction: Any) -> None:
    process = Diffusion(diffusion().alphas_cumprod, prediction)
    x_0, eps, at = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([10, 500, 999])
    signal, spread = process.shares(at, x_0)
    output = eps if prediction == "epsilon" else signal * eps - spread * x_0
    found = process.clean_and_noise(process.mixed(x_0, eps, at), output, at)
    assert torch.allclose(found[0], x_0, atol=1e-3)
    assert torch.allclose(found[1], eps, atol=1e-3)


def test_tau_stays_in_its_steps_interval_unless_intervals_overlap() -> None:
    step = FixedIntervals(1000, [4]).walk(4)[2]
    apart = draw_tau(step, 1000, 5000, Devices(), seeded(0))
    assert (int(apart.min()), int(apart.max())) == (249, 488)
    over = draw_tau(step, 1000, 5000, Devices(separate_intervals=False), seeded(0))
    assert int(over.min()) >= 249
    assert int(over.max()) > 900


def point_of(x_0: Tensor, tau: int, mixed: float = 1.0, fresh: float = 1.0) -> Point:
    ones = torch.ones_like(x_0)
    return Point(x_0, torch.zeros_like(x_0), torch.full((len(x_0),), tau), mixed * ones, fresh * ones)


def test_importance_is_the_ratio_of_the_two_noise_densities_per_dimension() -> None:
    weights = importance(point_of(torch.zeros(3, 4, 2, 2), 500, mixed=2.0, fresh=1.0))
    assert weights.tolist() == pytest.approx([math.exp(0.5 * (1 - 4))] * 3)


def test_fake_loss_weighs_by_capped_signal_to_noise_and_importance() -> None:
    process = diffusion()

    def fake(x_t: Tensor, tau_N: Tensor, conditions: Any, count: int) -> Tensor:
        return torch.zeros_like(x_t)  # x_tau is zero as well, so its clean estimate is zero

    for tau in (30, 900):
        point = point_of(torch.full((2, 4), 3.0), tau, mixed=1.2)
        ratio = float(process.alphas_cumprod[tau] / (1 - process.alphas_cumprod[tau]))
        plain = fake_loss(fake, process, point, {}, 1, Devices(importance_weight=False))  # type: ignore[arg-type]
        assert plain.item() == pytest.approx(9 * min(ratio, 5.0), rel=1e-4)
        weighed = fake_loss(fake, process, point, {}, 1, Devices())  # type: ignore[arg-type]
        assert weighed.item() == pytest.approx(plain.item() * math.exp(0.5 * (1 - 1.44)), rel=1e-4)


@pytest.mark.parametrize("huber", [True, False])
def test_student_loss_moves_the_clean_estimate_from_fake_to_teacher(huber: bool) -> None:
    x_0 = torch.randn(3, 4, 2, 2, generator=seeded(0)).requires_grad_()
    teacher, fake = torch.randn(3, 4, 2, 2, generator=seeded(1)), torch.randn(3, 4, 2, 2, generator=seeded(2))
    student_loss(point_of(x_0, 500), teacher, fake, Devices(huber=huber)).backward()
    assert x_0.grad is not None
    for gradient, wanted in zip(x_0.grad, teacher - fake, strict=True):
        assert torch.cosine_similarity(-gradient.flatten(), wanted.flatten(), 0) > 0.999


def test_huber_gradients_do_not_grow_with_the_gap() -> None:
    sizes = []
    for scale in (1.0, 100.0):
        x_0 = torch.zeros(1, 16).requires_grad_()
        student_loss(point_of(x_0, 500), scale * torch.ones(1, 16), torch.zeros(1, 16), Devices()).backward()
        assert x_0.grad is not None
        sizes.append(float(x_0.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


class Scaled(nn.Module):
    """A denoiser with one weight, which counts how often it is asked with gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.with_gradient = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Any, count: int) -> Tensor:
        self.with_gradient += torch.is_grad_enabled()
        return self.weight * x_t


def last_step_seed() -> int:
    return next(seed for seed in range(99) if int(torch.randint(4, (), generator=seeded(seed))) == 3)


@pytest.mark.parametrize(("one_step", "asked"), [(True, 1), (False, 4)])
def test_the_gradient_reaches_through_one_solver_step_or_the_whole_walk(one_step: bool, asked: int) -> None:
    student, walk = Scaled(), FixedIntervals(1000, [4]).walk(4)
    noise, generator = torch.randn(2, 4, generator=seeded(1)), seeded(last_step_seed())
    devices = Devices(one_step_gradient=one_step)
    point = student_point(student, diffusion(), walk, noise, {}, devices, generator)  # type: ignore[arg-type]
    assert student.with_gradient == asked
    assert point.x_0.requires_grad
    assert not point.x_tau.requires_grad


def test_noisy_states_carry_the_students_own_noise_and_clean_ones_do_not() -> None:
    walk, noise = FixedIntervals(1000, [4]).walk(4), torch.randn(4000, 4, generator=seeded(1))
    first = next(seed for seed in range(99) if int(torch.randint(4, (), generator=seeded(seed))) == 0)

    def correlation(devices: Devices) -> float:
        point = student_point(Exactly(), diffusion(), walk, noise, {}, devices, seeded(first))  # type: ignore[arg-type]
        pair = torch.stack([point.mixed_noise.flatten(), noise.flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    assert correlation(Devices()) > 0.5
    assert abs(correlation(Devices(noisy_states=False))) < 0.05


class Exactly(nn.Module):
    """Takes its input for noise whole: the clean estimate is (nearly) nothing."""

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Any, count: int) -> Tensor:
        return x_t


class Plane(nn.Module):
    """A denoiser of points in the plane: noise from position, timestep, class and step count."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + 16 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))  # fmt: skip
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 8)))

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Mapping[str, Tensor], count: int) -> Tensor:
        angles = timesteps_N[:, None] / 1000 * self.frequencies
        told = nn.functional.one_hot(torch.full((len(x_t),), count - 1), 8).float()
        return self.net(torch.cat([x_t, angles.sin(), angles.cos(), told], 1))


class Exact(nn.Module):
    """The optimal noise prediction for an even mixture of tight Gaussians: no training, no error."""

    def __init__(self, centres_M2: Tensor, spread: float, process: Diffusion) -> None:
        super().__init__()
        self.centres, self.spread, self.process = centres_M2, spread, process

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Mapping[str, Tensor], count: int) -> Tensor:
        signal, noise = self.process.shares(timesteps_N, x_t)
        variance = signal**2 * self.spread**2 + noise**2
        offsets = x_t[:, None] - signal[..., None] * self.centres
        nearness = torch.softmax(-offsets.square().sum(-1) / (2 * variance), 1)
        score = -(nearness[..., None] * offsets).sum(1) / variance
        return -noise * score


MODES = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(8).mul(math.pi / 4).tolist()])
MODE_SPREAD = 0.05


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killing_update(networks: Any, task: Any, options: Any, batch: Any, accelerator: Any, optimisers: Any) -> Any:
        if killing_update.left == 0:  # type: ignore[attr-defined]
            raise Killed
        killing_update.left -= 1  # type: ignore[attr-defined]
        return tdm_update(networks, task, options, batch, accelerator, optimisers)

    whole, losses = short_run(tmp_path / "whole", tdm_update)
    killing_update.left = 7  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        short_run(tmp_path / "stopped", killing_update)
    resumed, rest = short_run(tmp_path / "stopped", tdm_update)
    assert len(losses) == 12
    assert rest == pytest.approx(losses[7:], rel=1e-5)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def short_run(folder: Path, update: Any) -> tuple[Plane, list[float]]:
    torch.manual_seed(0)
    process, student, fake, losses = diffusion(), Plane(16), Plane(16), []
    task = Task(process, FixedIntervals(1000, [1, 2]), lambda _: ({}, {}), (2,),
                lambda _, values: losses.append(values["student_loss"]), lambda _: None)  # fmt: skip
    options = DistillOptions(12, batch=8, guidance=1.0, log_every=1, warmup_iterations=2, checkpoint_every_s=-1.0)
    networks: Any = Networks(student, fake, Exact(MODES, MODE_SPREAD, process))  # type: ignore[arg-type]
    distill(networks, task, options, folder, Accelerator(cpu=True), update)
    return student, losses
