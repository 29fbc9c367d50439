# SPDX-License-Identifier: Apache-2.0
"""The baseline TDM has to beat: regress each student step to the point where the teacher's own ODE arrives."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Conditions, Denoiser
from .diffusion import Diffusion
from .steps import Step
from .tdm import guided_clean_and_noise, solver_step

TEACHER_STEPS = 20


@torch.no_grad()
def teacher_trajectory(
    teacher: Denoiser,
    diffusion: Diffusion,
    walk: Sequence[Step],
    noise: Tensor,
    conditions: Conditions,
    unconditional: Conditions,
    guidance: float,
) -> list[Tensor]:
    """The teacher's states at every start of the walk, and its clean sample: `TEACHER_STEPS` guided DDIM steps."""
    states, x_t = [noise], noise
    per_step = -(-TEACHER_STEPS // len(walk))
    for step in walk:
        knots = torch.linspace(step.start, step.end, per_step + 1).round().int().tolist()
        for start, end in pairwise(knots):
            start_N, end_N = (torch.full((len(x_t),), each, device=x_t.device) for each in (start, end))
            asked = x_t, start_N, conditions, unconditional, guidance
            x_t = diffusion.mixed(*guided_clean_and_noise(teacher, diffusion, *asked), end_N)
        states.append(x_t)
    return states


def trajectory_loss(
    student: Denoiser, diffusion: Diffusion, walk: Sequence[Step], states: Sequence[Tensor], conditions: Conditions
) -> Tensor:
    """Mean squared error of the student's state after each step, asked from the teacher's state before it."""
    losses = []
    for index, step in enumerate(walk):
        _, x_end = solver_step(student, diffusion, states[index], step, conditions, len(walk))
        losses.append((x_end - states[index + 1]).square().mean())
    return torch.stack(losses).mean()
