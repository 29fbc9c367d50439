# SPDX-License-Identifier: Apache-2.0
"""The training loop of every distillation method: accelerate's devices, checkpoints that survive a kill, logs.

All randomness of an iteration comes from (seed, iteration), so a resumed run draws what the first would have.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ...ground.errors import TurbopocketError
from .denoiser import Conditions, Denoiser
from .diffusion import Diffusion
from .options import DistillOptions
from .steps import StepSchedule
from .tdm import fake_loss, guided_clean_and_noise, student_loss, student_point
from .trajectory_mse import teacher_trajectory, trajectory_loss

Role = Literal["student", "fake"]
"""The networks that a method may train."""
ADAM_BETAS, WEIGHT_DECAY = (0.0, 0.95), 1e-2
CHECKPOINT = "checkpoint"
FLOOR = 0.1  # of the peak learning rate, at the end


@dataclass(frozen=True)
class Networks:
    """Those that the method trains, by their roles, and the frozen teacher."""

    trained: Mapping[Role, Denoiser]
    teacher: Denoiser

    @property
    def student(self) -> Denoiser:
        """What the run is for."""
        return self.trained["student"]

    @property
    def fake(self) -> Denoiser:
        """The score that follows the student, where the method trains one."""
        return self.trained["fake"]


@dataclass(frozen=True)
class Task:
    """What a run is about, apart from its options.

    Attributes:
        guidance: the teacher's classifier-free guidance scale; 1 or less asks it once.
        seed: of everything random, with the iteration and the process.
        conditions_at: iteration -> (conditional, unconditional) conditions of its prompts.
        latent_shape: (C, h, w) of one sample.
        on_log: called with the iteration and the logged values; on_checkpoint: after each checkpoint.
    """

    diffusion: Diffusion
    schedule: StepSchedule
    conditions_at: Callable[[int], tuple[Conditions, Conditions]]
    latent_shape: tuple[int, ...]
    guidance: float
    seed: int
    on_log: Callable[[int, Mapping[str, float]], None]
    on_checkpoint: Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """The prompts of one iteration, and the generator of everything random in it."""

    conditions: Conditions
    unconditional: Conditions
    generator: torch.Generator

    def noise(self, task: Task, options: DistillOptions, device: torch.device) -> Tensor:
        """The starts of the batch's walks."""
        return torch.randn(options.batch, *task.latent_shape, generator=self.generator).to(device)


Update = Callable[
    [Networks, Task, DistillOptions, Batch, Accelerator, Mapping[str, Any]],
    dict[str, Tensor],
]
"""One iteration of a method: updates what it trains, returns the values to log."""


@dataclass(frozen=True)
class Method:
    """A way to distil: what an iteration does, and which networks it trains; only these are made and kept."""

    update: Update
    trains: tuple[Role, ...]


def distill(
    networks: Networks, task: Task, options: DistillOptions, folder: Path, accelerator: Accelerator, update: Update
) -> None:
    """Trains `networks.student` in place, going on from `folder/checkpoint` where one lies.

    At the end it holds the exponential moving average of its weights: a step from almost pure noise multiplies an
    error of the network by the inverse of the signal's share (15 at timestep 999), so it needs calm weights.
    """
    peaks = {"student": options.student_lr, "fake": options.fake_lr}
    roles = tuple(networks.trained)
    made = [_adamw(network, peaks[role]) for role, network in networks.trained.items()]
    prepared = accelerator.prepare(*networks.trained.values(), *made)
    trained = dict(zip(roles, prepared, strict=False))
    optimisers = dict(zip(roles, prepared[len(roles) :], strict=True))
    networks = Networks(trained, networks.teacher.to(accelerator.device))
    averaged = EMAModel(_trained(networks.student), decay=options.ema_decay)
    accelerator.register_for_checkpointing(averaged)
    first = restored_iteration(folder)
    if first:
        _restore(accelerator, folder / CHECKPOINT)
    saved = time.monotonic()
    for index in range(first, options.iterations):
        for role, optimiser in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = peaks[role] * learning_rate_share(index, options)
        seed = (task.seed * 1_000_003 + index) * 64 + accelerator.process_index
        batch = Batch(*task.conditions_at(index), torch.Generator().manual_seed(seed))
        values = update(networks, task, options, batch, accelerator, optimisers)
        averaged.step(_trained(networks.student))
        last = index + 1 == options.iterations
        if (index + 1) % options.log_every == 0 or last:
            task.on_log(index + 1, {name: float(value) for name, value in values.items()})
        if last or time.monotonic() - saved > options.checkpoint_every_s:
            _save(folder, accelerator, index + 1)
            task.on_checkpoint(index + 1)
            saved = time.monotonic()
    averaged.copy_to(_trained(networks.student))


def learning_rate_share(iteration: int, options: DistillOptions) -> float:
    """Share of the peak at an iteration: linear rise, then half a cosine down to a tenth."""
    if iteration < options.warmup_iterations:
        return (iteration + 1) / options.warmup_iterations
    rest = max(1, options.iterations - options.warmup_iterations)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (iteration - options.warmup_iterations) / rest))


def _trained(network: Denoiser) -> list[torch.nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _adamw(network: Denoiser, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(network), lr=lr, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY)


def _step(network: Denoiser, loss: Tensor, optimiser: Any, options: DistillOptions, accelerator: Accelerator) -> None:
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(network.parameters(), options.max_gradient_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def tdm_update(
    networks: Networks,
    task: Task,
    options: DistillOptions,
    batch: Batch,
    accelerator: Accelerator,
    optimisers: Mapping[str, Any],
) -> dict[str, Tensor]:
    """One update of the fake score, then one of the student, on the same samples."""
    diffusion, devices, conditions = task.diffusion, options.devices, batch.conditions
    walk = task.schedule.draw(batch.generator)
    noise = batch.noise(task, options, accelerator.device)
    with accelerator.autocast():
        point = student_point(networks.student, diffusion, walk, noise, conditions, devices, batch.generator)
        loss_of_fake = fake_loss(networks.fake, diffusion, point, conditions, len(walk), devices)
    _step(networks.fake, loss_of_fake, optimisers["fake"], options, accelerator)
    with accelerator.autocast():
        with torch.no_grad():
            asked = point.x_tau, point.tau_N, conditions
            real, _ = guided_clean_and_noise(networks.teacher, diffusion, *asked, batch.unconditional, task.guidance)
            fake_output = networks.fake(*asked, len(walk))
            fake, _ = diffusion.clean_and_noise(point.x_tau, fake_output, point.tau_N)
        loss = student_loss(point, real, fake, devices)
    _step(networks.student, loss, optimisers["student"], options, accelerator)
    gap = (real - fake).square().mean().sqrt()
    return {"student_loss": loss.detach(), "fake_loss": loss_of_fake.detach(), "score_gap": gap}


def mse_update(
    networks: Networks,
    task: Task,
    options: DistillOptions,
    batch: Batch,
    accelerator: Accelerator,
    optimisers: Mapping[str, Any],
) -> dict[str, Tensor]:
    """One update of the student towards the teacher's trajectory."""
    walk = task.schedule.draw(batch.generator)
    asked = walk, batch.noise(task, options, accelerator.device), batch.conditions, batch.unconditional
    with accelerator.autocast():
        states = teacher_trajectory(networks.teacher, task.diffusion, *asked, task.guidance)
        loss = trajectory_loss(networks.student, task.diffusion, walk, states, batch.conditions)
    _step(networks.student, loss, optimisers["student"], options, accelerator)
    return {"student_loss": loss.detach()}


METHODS: Mapping[str, Method] = {
    "tdm": Method(tdm_update, trains=("student", "fake")),
    "mse": Method(mse_update, trains=("student",)),
}


def _save(folder: Path, accelerator: Accelerator, iteration: int) -> None:
    """A whole checkpoint at `folder/checkpoint`; a kill at any moment leaves this one or the one before."""
    scratch, final, old = (folder / f"{CHECKPOINT}{suffix}" for suffix in (".partial", "", ".old"))
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (scratch / "iteration").write_text(str(iteration))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.replace(old)
        scratch.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _restore(accelerator: Accelerator, checkpoint: Path) -> None:
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # of accelerate, torch, safetensors, pickle: no common base
        first_line = str(error).strip().split("\n")[0]
        raise _damaged(checkpoint, first_line) from error


def _damaged(checkpoint: Path, why: str) -> TurbopocketError:
    return TurbopocketError(
        f"checkpoint {checkpoint} is damaged: {why}", hint=f"remove {checkpoint.parent}; the run then starts again"
    )


def restored_iteration(folder: Path) -> int:
    """The iteration that a run in this folder goes on from: 0 without a checkpoint.

    Raises TurbopocketError for a damaged one.
    """
    final, old = folder / CHECKPOINT, folder / f"{CHECKPOINT}.old"
    if not final.exists() and old.exists():
        old.replace(final)
    if not final.exists():
        return 0
    try:
        return int((final / "iteration").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(final, str(error)) from error
