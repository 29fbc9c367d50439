# SPDX-License-Identifier: Apache-2.0
"""Distillation: the walk, the noise arithmetic, the losses, resume, and a mixture that tells TDM from regression."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.distill.diffusion import Diffusion
from turbopocket.quant.distill.options import Devices, DistillOptions
from turbopocket.quant.distill.steps import FixedIntervals
from turbopocket.quant.distill.tdm import Point, draw_tau, drawn, fake_loss, importance, student_loss, student_point
from turbopocket.quant.distill.trainer import Networks, Task, distill, mse_update, tdm_update

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
    with pytest.raises(TurbopocketError, match="allowed are 1 to 8"):
        FixedIntervals(1000, counts)


def test_walks_of_fewer_steps_are_drawn_more_often() -> None:
    schedule, generator = FixedIntervals(1000, [1, 4]), seeded(3)
    drawn_counts = [len(schedule.draw(generator)) for _ in range(3000)]
    for count, odds in ((1, 0.5858), (4, 0.4142)):
        assert drawn_counts.count(count) / 3000 == pytest.approx(odds, abs=0.03)


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
    """A denoiser of points in the plane, from position and timestep; it may be blind to the second coordinate."""

    def __init__(self, width: int, blind: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2 + 8, width), nn.SiLU()]
        layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)
        self.seen = torch.tensor([1.0, 0.0 if blind else 1.0])

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Any, count: int) -> Tensor:
        angles = timesteps_N[:, None] / 1000 * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        output: Tensor = self.net(torch.cat([1.5 * self.seen * x_t, angles.sin(), angles.cos()], 1))
        return output


PLANE = Diffusion(torch.cos(torch.linspace(0.02, 0.98, 1000) * torch.pi / 2).square(), "v_prediction")
MODES = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
MODE_SPREAD = 0.15


def plane_task(losses: list[float]) -> Task:
    def on_log(_: int, values: Any) -> None:
        losses.append(values["student_loss"])

    return Task(PLANE, FixedIntervals(1000, [1]), lambda _: ({}, {}), (2,), 1.0, 0, on_log, lambda _: None)


@pytest.fixture(scope="module")
def plane_teacher() -> Plane:
    """A denoiser that has learnt the mixture of `MODES`."""
    torch.manual_seed(0)
    teacher, steps, generator = Plane(128), 1200, seeded(5)
    optimiser = torch.optim.Adam(teacher.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x_0 = MODES[torch.randint(len(MODES), (512,), generator=generator)]
        x_0 = x_0 + MODE_SPREAD * torch.randn(512, 2, generator=generator)
        noise, at = torch.randn(512, 2, generator=generator), torch.randint(1000, (512,), generator=generator)
        signal, spread = PLANE.shares(at, x_0)
        loss = (teacher(signal * x_0 + spread * noise, at, {}, 1) - (signal * noise - spread * x_0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return teacher.requires_grad_(False)


def distilled_blind(teacher: Plane, update: Any, iterations: int, student_lr: float, folder: Path) -> Tensor:
    """(4000, 2) one-step samples of a student that began as the teacher but sees only half of the noise."""
    torch.manual_seed(0)
    student, fake = Plane(128, blind=True), Plane(128)
    for network in (student, fake):
        network.load_state_dict(teacher.state_dict())
    options = DistillOptions(iterations, batch=256, student_lr=student_lr, fake_lr=1.5e-3)
    networks: Any = Networks({"student": student, "fake": fake}, teacher)  # type: ignore[arg-type]
    distill(networks, plane_task([]), options, folder, Accelerator(cpu=True), update)
    noise = torch.randn(4000, 2, generator=seeded(9))
    return drawn(student, PLANE, FixedIntervals(1000, [1]).walk(1), noise, {})  # type: ignore[arg-type]


def shares_of_modes(points: Tensor) -> Tensor:
    """(modes,) share of the points within three spreads of each mode."""
    return (torch.cdist(points, MODES) < 3 * MODE_SPREAD).float().mean(0)


def test_tdm_recovers_the_modes_that_regression_averages_away(plane_teacher: Plane, tmp_path: Path) -> None:
    """Noise decides the teacher's mode, and a few-step student cannot follow it all the way.

    This one sees half of it. Regression to the teacher's pairs then lands between the modes; TDM asks only for the
    teacher's distribution, and finds other ways to every mode. As many network evaluations for both.
    """
    tdm = shares_of_modes(distilled_blind(plane_teacher, tdm_update, 1500, 3e-4, tmp_path / "tdm"))
    mse = shares_of_modes(distilled_blind(plane_teacher, mse_update, 500, 2e-3, tmp_path / "mse"))
    assert tdm.min() > 0.1
    assert tdm.sum() > 0.6
    assert mse.sum() < 0.05


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
    student, losses = Plane(16), list[float]()
    options = DistillOptions(12, batch=8, log_every=1, warmup_iterations=2, checkpoint_every_s=-1.0)
    networks: Any = Networks({"student": student, "fake": Plane(16)}, Plane(16).requires_grad_(False))  # type: ignore
    distill(networks, plane_task(losses), options, folder, Accelerator(cpu=True), update)
    return student, losses
