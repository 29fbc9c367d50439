# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a few-step model folder of the same layout: teacher, student, fake score, prompts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ...ground.errors import TurbopocketError
from ...ground.extras import install_hint
from ...quant.distill import trainer
from ...quant.distill.denoiser import Conditions
from ...quant.distill.options import Precision
from ...quant.distill.steps import FixedIntervals
from ...quant.distill.tdm import drawn
from ...quant.distill.trainer import METHODS, Task, restored_iteration
from ...runtimes.drawing.latents import to_vae
from ..checkpoint.links import refuse_links_out
from ..checkpoint.load import load
from ..evidence import evidence_for, read_prompts
from ..families.base import LoadedModel
from ..families.sizes import latent_size
from ..output.owned import write_record
from ..output.staging import Claim, claimed, output_path, run_folder
from ..progress import Advance, StageProgress
from ..sampling.defaults import sampling_of
from ..sampling.spec import image_spec
from .networks import networks_of
from .prompt_states import PromptStates
from .recipe import DistillRecipe
from .run import claim_run, refuse_student
from .student import OWN, write_student
from .teacher import diffusion_of, require_plain

PROMPTS = 20_000
WATCHED_PROMPTS = 4


@dataclass(frozen=True)
class Distilled:
    """A student, and how it came about.

    Attributes:
        folder: a model folder of the teacher's layout, with the recipe as `distill.toml`.
        run: the folder of checkpoints and TensorBoard logs beside it.
        recipe: what was asked for, with guidance and precision as they were.
        notes: what to know of the teacher, and what of its sampling was assumed.
    """

    folder: Path
    run: Path
    recipe: DistillRecipe
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "model": str(self.folder),
            "steps": self.recipe.distill.steps,
            "method": self.recipe.distill.method,
            "run": str(self.run),
            "notes": list(self.notes),
        }


def distill(
    recipe: DistillRecipe, out: Path | str, overwrite: bool = False, progress: StageProgress | None = None
) -> Distilled:
    """Teaches a copy of a model to draw in a few steps: the model folder `out`, for 1 to `distill.steps` of them.

    It goes on from `<out>.run` where an earlier start of the same run was stopped; `progress` is told of each stage, by
    default on stderr. Raises TurbopocketError for bad input; `out` then does not change.
    """
    out, progress = output_path(Path(out)), progress or StageProgress()
    _require_writer()
    recipe = _with_precision(recipe)
    accelerator = Accelerator(
        mixed_precision=recipe.distill.precision, log_with="tensorboard", project_dir=str(run_folder(out))
    )
    if not accelerator.is_main_process:
        return _distilled(recipe, out, None, accelerator, progress)
    with claimed(out, lambda: refuse_student(out, overwrite)) as claim:
        return _distilled(recipe, out, claim, accelerator, progress)


def fastest_precision() -> Precision:
    """Returns bf16 where the device multiplies in it, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return "bf16" if native else "no"


def _with_precision(recipe: DistillRecipe) -> DistillRecipe:
    if recipe.distill.precision != "auto":
        return recipe
    return recipe.model_copy(update={"distill": replace(recipe.distill, precision=fastest_precision())})


def _distilled(
    recipe: DistillRecipe, out: Path, claim: Claim | None, accelerator: Accelerator, progress: StageProgress
) -> Distilled:
    """What `distill` returns; the first of several processes holds the claim for all."""
    run, asked = run_folder(out), recipe.distill
    with progress.stage("load"):
        model = load(recipe.teacher.source, config=recipe.teacher.config)
        prompts = _prompts(model, recipe)
    if out.exists() and out.samefile(model.folder):
        raise TurbopocketError(f"output {out} is the teacher's folder", hint="give another folder")
    require_plain(model)
    copied = [path for path in sorted(model.folder.rglob("*")) if path.relative_to(model.folder).parts[0] not in OWN]
    refuse_links_out(copied, model.folder)
    sampling = sampling_of(model, asked.steps, recipe.teacher.guidance)
    teacher = recipe.teacher.model_copy(update={"guidance": sampling.guidance})
    recipe = recipe.model_copy(update={"teacher": teacher})
    diffusion = diffusion_of(model, asked.horizon)
    schedule = FixedIntervals(diffusion.train_timesteps, range(1, asked.steps + 1))
    set_seed(recipe.seed)
    networks = networks_of(model.modules["unet"], asked, accelerator.device)
    with accelerator.main_process_first():
        claim_run(run, recipe, model)
    accelerator.init_trackers("log")
    source = _PromptSource(model, prompts, recipe, accelerator)
    config: Any = model.modules["unet"].config
    shape = (config.in_channels, *latent_size(model, model.image_size))

    def watch(iteration: int) -> None:
        if accelerator.is_main_process:
            noise = torch.randn(WATCHED_PROMPTS, *shape, generator=torch.Generator().manual_seed(recipe.seed))
            walk = schedule.walk(asked.steps)
            latents = drawn(networks.student, diffusion, walk, noise.to(accelerator.device), source.watched())
            pictures = _decoded(model, latents)
            accelerator.get_tracker("tensorboard", unwrap=True).add_images("student", pictures.numpy(), iteration)

    first = restored_iteration(run)
    with progress.stage("distill", asked.iterations - first) as advance:
        on_log = _Log(accelerator, progress, advance, first, asked.iterations)
        about = shape, sampling.guidance, recipe.seed
        task = Task(diffusion, schedule, source.conditions_at, *about, on_log, watch)
        trainer.distill(networks, task, asked, run, accelerator, METHODS[asked.method].update)
    accelerator.end_training()
    if claim is not None:
        with progress.stage("save"), claim.staged(out) as (folder,):
            write_student(folder, model, networks.student, recipe)
            write_record(folder)
    return Distilled(out, run, recipe, (*model.notes, *sampling.notes))


class _PromptSource:
    """Conditions of randomly chosen prompts; an iteration's choice depends on seed, iteration and process alone."""

    def __init__(
        self, model: LoadedModel, prompts: Sequence[str], recipe: DistillRecipe, accelerator: Accelerator
    ) -> None:
        self._states, self._prompts = PromptStates(model, accelerator.device), prompts
        self._seed, self._batch, self._process = recipe.seed, recipe.distill.batch, accelerator.process_index

    def conditions_at(self, iteration: int) -> tuple[Conditions, Conditions]:
        seed = (self._seed * 1_000_003 + iteration) * 64 + self._process
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self._prompts), (self._batch,), generator=generator)
        conditional = self._states.conditional([self._prompts[index] for index in chosen.tolist()])
        return conditional, self._states.unconditional(conditional)

    def watched(self) -> Conditions:
        """Conditions of the prompts whose pictures are logged: always the same."""
        return self._states.conditional([self._prompts[i % len(self._prompts)] for i in range(WATCHED_PROMPTS)])


class _Log:
    """Takes the values of each logged iteration to TensorBoard and to the waiting person."""

    def __init__(
        self, accelerator: Accelerator, progress: StageProgress, advance: Advance, first: int, iterations: int
    ) -> None:
        self._accelerator, self._progress, self._advance = accelerator, progress, advance
        self._first, self._done, self._iterations, self._started = first, first, iterations, time.monotonic()

    def __call__(self, iteration: int, values: Mapping[str, float]) -> None:
        self._accelerator.log(dict(values), step=iteration)
        per_iteration_s = (time.monotonic() - self._started) / (iteration - self._first)
        left_min = per_iteration_s * (self._iterations - iteration) / 60
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._accelerator.is_main_process:
            self._progress.note(f"{iteration}/{self._iterations}: {shown}; {left_min:.0f} min left")
        for _ in range(iteration - self._done):
            self._advance()
        self._done = iteration


def _require_writer() -> None:
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise TurbopocketError(
            "distillation logs for TensorBoard, and no writer of its files is installed",
            hint=install_hint("tensorboardX"),
        )


def _prompts(model: LoadedModel, recipe: DistillRecipe) -> list[str]:
    if recipe.distill.prompts is None:
        return evidence_for(model).prompts("calibrate", PROMPTS, recipe.seed)
    return read_prompts(recipe.distill.prompts)


@torch.no_grad()
def _decoded(model: LoadedModel, latents: Tensor) -> Tensor:
    """(N, 3, H, W) pictures in 0..1."""
    vae: Any = model.modules["vae"]
    sample = vae.decode(
        torch.from_numpy(to_vae(image_spec(model, model.image_size), latents.float().cpu().numpy()))
    ).sample
    pictures: Tensor = (sample / 2 + 0.5).clamp(0, 1)
    return pictures
