# SPDX-License-Identifier: Apache-2.0
"""Trajectory distribution matching: the losses of one iteration (Luo et al. 2025, arXiv 2503.06674).

The student's distribution at every point of its few-step walk is pulled to the teacher's, by the difference of two
scores: the frozen teacher's and that of a fake score network, which follows the student.

Shape suffixes: N samples. "tau" is the timestep at which both scores are asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Conditions, Denoiser
from .diffusion import Diffusion
from .options import Devices
from .steps import Step

LEAST_TAU = 20
TAU_MARGIN = 10
"""tau stays this far below the step's start, as in the released code."""
SNR_CAP = 5.0
HUBER_C = 0.00054  # times the root of the latents' size, as in the paper


@dataclass(frozen=True)
class Point:
    """Where the student arrived by one step, and where the scores will look at it.

    Attributes:
        x_0: (N, ...) its clean estimate, with gradient; x_tau: noised to `tau_N`, without.
        mixed_noise: the noise in x_tau as seen from x_0; fresh_noise: the part that was just drawn, unit variance.
    """

    x_0: Tensor
    x_tau: Tensor
    tau_N: Tensor
    mixed_noise: Tensor
    fresh_noise: Tensor


def solver_step(
    student: Denoiser, diffusion: Diffusion, x_t: Tensor, step: Step, conditions: Conditions, count: int
) -> tuple[Tensor, Tensor]:
    """The student's clean estimate at `step.start`, and its DDIM state at `step.end`."""
    start_N, end_N = (torch.full((len(x_t),), each, device=x_t.device) for each in (step.start, step.end))
    x_0, eps = diffusion.clean_and_noise(x_t, student(x_t, start_N, conditions, count), start_N)
    return x_0, diffusion.mixed(x_0, eps, end_N)


def student_point(
    student: Denoiser,
    diffusion: Diffusion,
    walk: Sequence[Step],
    noise: Tensor,
    conditions: Conditions,
    devices: Devices,
    generator: torch.Generator,
) -> Point:
    """Walks from pure noise to a step drawn evenly from the walk, takes it, and noises the result to a drawn tau."""
    chosen = int(torch.randint(len(walk), (), generator=generator))
    step, x_t = walk[chosen], noise
    with torch.set_grad_enabled(not devices.one_step_gradient):
        for earlier in walk[:chosen]:
            _, x_t = solver_step(student, diffusion, x_t, earlier, conditions, len(walk))
    x_0, x_end = solver_step(student, diffusion, x_t, step, conditions, len(walk))
    tau_N = draw_tau(step, diffusion.train_timesteps, len(noise), devices, generator).to(noise.device)
    fresh = torch.randn(noise.shape, generator=generator).to(noise)
    with torch.no_grad():
        if devices.noisy_states:
            x_tau = diffusion.diffused(x_end, torch.full_like(tau_N, step.end), tau_N, fresh)
        else:
            x_tau = diffusion.mixed(x_0, fresh, tau_N)
        signal, spread = diffusion.shares(tau_N, x_tau)
        mixed_noise = (x_tau - signal * x_0) / spread
    return Point(x_0, x_tau, tau_N, mixed_noise, fresh)


@torch.no_grad()
def drawn(
    student: Denoiser, diffusion: Diffusion, walk: Sequence[Step], noise: Tensor, conditions: Conditions
) -> Tensor:
    """Clean latents: the whole walk from pure noise."""
    x_t = noise
    for step in walk:
        _, x_t = solver_step(student, diffusion, x_t, step, conditions, len(walk))
    return x_t


def draw_tau(step: Step, train_timesteps: int, count: int, devices: Devices, generator: torch.Generator) -> Tensor:
    """(count,) timesteps between the step's end and start, or from its end to pure noise when intervals overlap."""
    low = max(LEAST_TAU, step.end)
    high = max(low + 1, (step.start if devices.separate_intervals else train_timesteps) - TAU_MARGIN)
    return torch.randint(low, high, (count,), generator=generator)


def fake_loss(
    fake: Denoiser, diffusion: Diffusion, point: Point, conditions: Conditions, count: int, devices: Devices
) -> Tensor:
    """Denoising score matching on the student's samples, weighted by min(SNR, 5) and the importance of each."""
    x_0, _ = diffusion.clean_and_noise(point.x_tau, fake(point.x_tau, point.tau_N, conditions, count), point.tau_N)
    errors_N = (x_0 - point.x_0.detach()).square().flatten(1).mean(1)
    weights_N = diffusion.signal_to_noise(point.tau_N).clamp(max=SNR_CAP)
    if devices.importance_weight:
        weights_N = weights_N * importance(point)
    return (weights_N * errors_N).mean()


def importance(point: Point) -> Tensor:
    """(N,) exp(-mean(mixed²)/2) / exp(-mean(fresh²)/2): how likely x_tau is from x_0 against from the state."""
    mixed_N, fresh_N = (each.square().flatten(1).mean(1) for each in (point.mixed_noise, point.fresh_noise))
    return torch.exp(0.5 * (fresh_N - mixed_N))


def guided_clean_and_noise(
    teacher: Denoiser,
    diffusion: Diffusion,
    x_t: Tensor,
    timesteps_N: Tensor,
    conditions: Conditions,
    unconditional: Conditions,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """The teacher's (x_0, eps) with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""
    output = teacher(x_t, timesteps_N, conditions, 1)
    if guidance > 1:
        away = teacher(x_t, timesteps_N, unconditional, 1)
        output = away + guidance * (output - away)
    return diffusion.clean_and_noise(x_t, output, timesteps_N)


def student_loss(point: Point, teacher_x_0: Tensor, fake_x_0: Tensor, devices: Devices) -> Tensor:
    """The surrogate whose gradient moves the student's x_0 from what the fake score sees to what the teacher sees."""
    direction = teacher_x_0 - fake_x_0
    if devices.huber:
        c = HUBER_C * point.x_0[0].numel() ** 0.5
        distances_N = ((point.x_0 - (point.x_0 + direction).detach()).square().flatten(1).sum(1) + c * c).sqrt() - c
        return distances_N.mean()
    scale_N = (point.x_0.detach() - teacher_x_0).abs().flatten(1).mean(1).clamp(min=1e-6)
    target = (point.x_0 + direction / scale_N.reshape(-1, *[1] * (direction.ndim - 1))).detach()
    return 0.5 * (point.x_0 - target).square().mean()
