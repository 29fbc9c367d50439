# SPDX-License-Identifier: Apache-2.0
"""How a distillation run trains, with its source; these are keys of a recipe's `[distill]` as well."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ground.errors import TurbopocketError

METHOD_NAMES = ("tdm", "mse")
"""Every method's name; the trainer's `METHODS` are the methods, in the same order."""
MAX_STEPS = 8
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Devices:
    """TDM's six devices (arXiv 2503.06674); each can be switched off to run its ablation.

    Attributes:
        separate_intervals: tau is drawn from the step's own interval, so one fake score serves all steps.
        importance_weight: the fake score's loss is weighted by q(x_tau | x_0 of the student) / q(x_tau | x_t),
            both per dimension: it was noised from the state, and regresses to the clean estimate.
        huber: pseudo-Huber surrogate, else the KL gradient scaled by 1 / mean |x_0 - teacher's x_0| (DMD).
        noisy_states: x_tau is diffused from the student's noisy state, else from its clean estimate.
        step_condition: student and fake score are told how many steps the walk has.
        one_step_gradient: the gradient reaches through one solver step, else through the whole walk so far.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    separate_intervals: bool = True
    importance_weight: bool = True
    huber: bool = True
    noisy_states: bool = True
    step_condition: bool = True
    one_step_gradient: bool = True


@dataclass(frozen=True)
class DistillOptions:
    """How a run trains. Learning rates are those of the released PixArt demo; small models take thirty times as much.

    Attributes:
        iterations: student updates; batch: prompts in each, per process.
        student_lr, fake_lr: the fake score must be the faster learner (five times, in the released code).
        warmup_iterations: of both learning rates, which then fall along half a cosine to a tenth.
        ema_decay: of the average of the student's weights, which is what the run ends with.
        max_gradient_norm: each network's gradients are clipped to it.
        devices: of TDM, all on; checkpoint_every_s: seconds between checkpoints; log_every: iterations between logs.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    iterations: int = 2000
    batch: int = 32
    student_lr: float = 4e-6
    fake_lr: float = 2e-5
    warmup_iterations: int = 50
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.98
    devices: Devices = Devices()
    checkpoint_every_s: float = 300.0
    log_every: int = 25

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise TurbopocketError(f"{name} = {getattr(self, name)}: 1 or more is needed")
        for name in ("student_lr", "fake_lr"):
            if not 0 < getattr(self, name) < 1:
                raise TurbopocketError(f"{name} = {getattr(self, name)}: a learning rate lies between 0 and 1")
        if self.warmup_iterations < 0:
            raise TurbopocketError(f"warmup_iterations = {self.warmup_iterations}: 0 or more is needed")
        if not self.max_gradient_norm > 0:
            raise TurbopocketError(f"max_gradient_norm = {self.max_gradient_norm}: more than 0 is needed")
        if not 0 <= self.ema_decay < 1:
            raise TurbopocketError(f"ema_decay = {self.ema_decay}: it lies between 0, and 1 which never moves")
