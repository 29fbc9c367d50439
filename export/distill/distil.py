# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a few-step model folder of the same layout: teacher, student, fake score, prompts."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn

from ...ground.errors import TurbopocketError
from ...ground.files import write_whole
from ...quant.distill.denoiser import BIAS, Conditions, Denoiser, lora_copy, student_copy
from ...quant.distill.diffusion import Diffusion
from ...quant.distill.options import DEVICE_NAMES, Devices, DistillOptions
from ...quant.distill.steps import FixedIntervals
from ...quant.distill.tdm import drawn
from ...quant.distill.trainer import METHODS, Networks, Precision, Task, distill, restored_iteration
from ...runtimes.drawing.latents import to_vae
from ...runtimes.schedule import SamplerSpec, alphas_cumprod
from ...runtimes.scheduler_classes import config_for
from ..checkpoint.links import refuse_links_out
from ..checkpoint.load import load
from ..evidence import evidence_for, read_prompts
from ..families.base import LoadedModel
from ..families.sizes import latent_size
from ..families.student import STEP_BIASES_FILE
from ..output.owned import refuse_folder, refuse_run, write_record
from ..output.staging import Claim, claimed, output_path, run_folder
from ..progress import Advance, StageProgress
from ..sampling.defaults import sampling_of
from ..sampling.spec import image_spec
from .prompt_states import PromptStates

PROMPTS = 20_000
WATCHED_PROMPTS = 4
RUN_FILE = "run.json"
LEAST_HORIZON = 100
OWN = ("unet", "judge")
"""Folders of a teacher that its student does not get."""
BYTES_PER_TRAINED = 16  # weight, gradient, two moments; fp32
"""Of student and of fake score; the teacher and what LoRA shares hold 4."""


@dataclass(frozen=True)
class DistillRequest:
    """What the user asks for, beside the options of the method.

    `config` completes a source that is a single file or a UNet (see `families.load`). `guidance` None is what the
    teacher ships with, `lora_rank` None trains all weights. `prompts` is a text file, one a line; without it, the
    model's own. The student's walks start at training timestep `horizon` - 1 from pure noise: the teacher's last
    timesteps hold next to no signal, and what a network says there is multiplied by its inverse (the released code
    of TDM starts at 800 of 1000, or at 900). `precision` "auto" is bf16 where the device multiplies in it, else
    float32: a CPU that has to imitate bf16 is 35 times slower in it.
    """

    source: str
    steps: int
    method: str
    options: DistillOptions
    guidance: float | None = None
    prompts: Path | None = None
    lora_rank: int | None = None
    horizon: int = 800
    precision: str = "auto"
    gradient_checkpointing: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        _require_known("method", [self.method], tuple(METHODS))
        _require_known("precision", [self.precision], ("auto", *get_args(Precision)))
        FixedIntervals(1000, [self.steps])
        if self.lora_rank is not None and self.lora_rank < 1:
            raise TurbopocketError(f"LoRA rank {self.lora_rank}: 1 or more is needed")


def devices_without(names: Sequence[str]) -> Devices:
    """Returns TDM's devices with those of the names off. Raises TurbopocketError for an unknown name."""
    _require_known("device", names, DEVICE_NAMES)
    return Devices(**{name: name not in names for name in DEVICE_NAMES})


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise TurbopocketError(f"{what} {name!r} is not known: known are {', '.join(known)}")


def fastest_precision() -> Precision:
    """Returns bf16 where the device multiplies in it, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return "bf16" if native else "no"


def distil(request: DistillRequest, out: Path, overwrite: bool, progress: StageProgress) -> dict[str, Any]:
    """Makes the model folder `out`, going on from `<out>.run` where an earlier start of the same run was stopped.

    Returns a JSON-ready summary. Raises TurbopocketError for bad input; `out` then does not change.
    """
    out = output_path(out)
    _require_writer()
    precision = fastest_precision() if request.precision == "auto" else request.precision
    accelerator = Accelerator(mixed_precision=precision, log_with="tensorboard", project_dir=str(run_folder(out)))
    if not accelerator.is_main_process:
        return _distilled(request, out, None, accelerator, progress)
    with claimed(out, lambda: _refuse(out, overwrite)) as claim:
        return _distilled(request, out, claim, accelerator, progress)


def _distilled(
    request: DistillRequest, out: Path, claim: Claim | None, accelerator: Accelerator, progress: StageProgress
) -> dict[str, Any]:
    """What `distil` returns; the first of several processes holds the claim for all."""
    run = run_folder(out)
    with progress.stage("load"):
        model = load(request.source, config=request.config)
        prompts = _prompts(model, request)
    if out.exists() and out.samefile(model.folder):
        raise TurbopocketError(f"output {out} is the teacher's folder", hint="give another folder")
    _require_plain(model)
    copied = [path for path in sorted(model.folder.rglob("*")) if path.relative_to(model.folder).parts[0] not in OWN]
    refuse_links_out(copied, model.folder)
    sampling = sampling_of(model, request.steps, request.guidance)
    options = replace(request.options, guidance=sampling.guidance)
    diffusion = _diffusion(model, request.horizon)
    schedule = FixedIntervals(diffusion.train_timesteps, range(1, request.steps + 1))
    set_seed(options.seed)
    networks = _networks(model, request, accelerator.device)
    with accelerator.main_process_first():
        _claim(run, request, options, model)
    accelerator.init_trackers("log")
    source = _PromptSource(model, prompts, options, accelerator)
    config: Any = model.modules["unet"].config
    shape = (config.in_channels, *latent_size(model, model.image_size))

    def watch(iteration: int) -> None:
        if accelerator.is_main_process:
            noise = torch.randn(WATCHED_PROMPTS, *shape, generator=torch.Generator().manual_seed(options.seed))
            walk = schedule.walk(request.steps)
            latents = drawn(networks.student, diffusion, walk, noise.to(accelerator.device), source.watched())
            pictures = _decoded(model, latents)
            accelerator.get_tracker("tensorboard", unwrap=True).add_images("student", pictures.numpy(), iteration)

    first = restored_iteration(run)
    with progress.stage("distill", options.iterations - first) as advance:
        on_log = _Log(accelerator, progress, advance, first, options.iterations)
        task = Task(diffusion, schedule, source.conditions_at, shape, on_log, watch)
        distill(networks, task, options, run, accelerator, METHODS[request.method])
    accelerator.end_training()
    if claim is not None:
        with progress.stage("save"), claim.staged(out) as (folder,):
            _write(folder, model, networks.student, request)
            write_record(folder)
    return {
        "model": str(out),
        "steps": request.steps,
        "method": request.method,
        "run": str(run),
        "notes": [*model.notes, *sampling.notes],
    }


class _PromptSource:
    """Conditions of randomly chosen prompts; an iteration's choice depends on seed, iteration and process alone."""

    def __init__(
        self, model: LoadedModel, prompts: Sequence[str], options: DistillOptions, accelerator: Accelerator
    ) -> None:
        self._states, self._prompts = PromptStates(model, accelerator.device), prompts
        self._options, self._process = options, accelerator.process_index

    def conditions_at(self, iteration: int) -> tuple[Conditions, Conditions]:
        seed = (self._options.seed * 1_000_003 + iteration) * 64 + self._process
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self._prompts), (self._options.batch,), generator=generator)
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


def _refuse(out: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when a student can not take the place of what is at `out`, or its run that beside it."""
    refuse_folder(out, overwrite)
    run = run_folder(out)
    known = (run / RUN_FILE).is_file()
    refuse_run(out, [] if known else [path for path in sorted(run.glob("*")) if path.name != f"{RUN_FILE}.partial"])


def _require_writer() -> None:
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise TurbopocketError(
            "distillation logs for TensorBoard, and no writer of its files is installed",
            hint="pip install 'turbopocket[train]'",
        )


def _require_plain(model: LoadedModel) -> None:
    """Raises TurbopocketError for a teacher that is told its guidance: it is asked with and without a prompt here."""
    config: Any = model.modules["unet"].config
    if config.time_cond_proj_dim is not None:
        raise TurbopocketError(
            f"{model.name} can not be distilled: its UNet is told the guidance (time_cond_proj_dim is "
            f"{config.time_cond_proj_dim}), a teacher must be one that is not"
        )


def _prompts(model: LoadedModel, request: DistillRequest) -> list[str]:
    if request.prompts is None:
        return evidence_for(model).prompts("calibrate", PROMPTS, request.options.seed)
    return read_prompts(request.prompts)


def _diffusion(model: LoadedModel, horizon: int) -> Diffusion:
    """The teacher's process up to the horizon. Raises TurbopocketError for a horizon that it does not have, and for a
    noise schedule that a first and a last beta do not say.
    """
    spec = _noise_schedule(model)
    if spec.rescale_betas_zero_snr:
        raise TurbopocketError(
            "rescale_betas_zero_snr = True: cut at a horizon, this teacher's noise schedule is none that a first and a "
            "last beta say"
        )
    if not LEAST_HORIZON <= horizon <= spec.num_train_timesteps:
        raise TurbopocketError(
            f"horizon {horizon}: this teacher has {spec.num_train_timesteps} timesteps, "
            f"at least {LEAST_HORIZON} are needed"
        )
    return Diffusion(torch.from_numpy(alphas_cumprod(spec))[:horizon], spec.prediction_type)


def _noise_schedule(model: LoadedModel) -> SamplerSpec:
    """What the teacher was trained on, whichever sampler its folder names: a student's is DDIM."""
    return SamplerSpec.from_scheduler_config(config_for(model.scheduler_config, "ddim"), 1, 1.0)


def _beta_end(spec: SamplerSpec, horizon: int) -> float:
    """The last beta of the schedule's first `horizon` timesteps, which are a schedule of the same kind."""
    share = (horizon - 1) / (spec.num_train_timesteps - 1)
    if spec.beta_schedule == "linear":
        return spec.beta_start + share * (spec.beta_end - spec.beta_start)
    first, last = spec.beta_start**0.5, spec.beta_end**0.5
    return (first + share * (last - first)) ** 2


def _claim(run: Path, request: DistillRequest, options: DistillOptions, model: LoadedModel) -> None:
    """Makes the folder of checkpoints and logs, or finds it of this run. Raises TurbopocketError for another's."""
    wanted = {
        "model": model.name,
        "parameters": sum(parameter.numel() for parameter in model.modules["unet"].parameters()),
        "steps": request.steps,
        "method": request.method,
        "lora_rank": request.lora_rank,
        "horizon": request.horizon,
        "options": asdict(options),
    }
    file = run / RUN_FILE
    if not file.is_file():
        run.mkdir(parents=True, exist_ok=True)
        with write_whole(file) as partial:
            partial.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    try:
        found = json.loads(file.read_text())
        odd = [key for key in wanted if found[key] != wanted[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise TurbopocketError(f"{file} is not the record of a distillation run: {error}") from error
    if odd:
        raise TurbopocketError(
            f"{run} holds another run: {odd[0]} is {found[odd[0]]!r} there, {wanted[odd[0]]!r} here",
            hint="remove that folder, or give another --out",
        )


def _networks(model: LoadedModel, request: DistillRequest, device: torch.device) -> Networks:
    unet = model.modules["unet"]
    _require_memory(unet, request, device)
    told = request.options.devices.step_condition
    copies: list[Any] = [
        student_copy(unet) if request.lora_rank is None else lora_copy(unet, request.lora_rank) for _ in range(2)
    ]
    if request.gradient_checkpointing:
        for each in copies:
            each.enable_gradient_checkpointing()
    return Networks(Denoiser(copies[0], told), Denoiser(copies[1], told), Denoiser(unet, False))


def _require_memory(unet: nn.Module, request: DistillRequest, device: torch.device) -> None:
    """Raises TurbopocketError when weights, gradients and moments alone are more than is free."""
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    trained = 2 * parameters * BYTES_PER_TRAINED if request.lora_rank is None else 0
    needed = 4 * parameters + trained
    free = _free_bytes(device)
    if free is not None and needed > free:
        raise TurbopocketError(
            f"teacher, student and fake score need {needed / 1e9:.1f} GB before any activation, {free / 1e9:.1f} GB "
            f"are free on {device.type}",
            hint="train LoRA matrices only: --lora-rank 64" if request.lora_rank is None else None,
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@torch.no_grad()
def _decoded(model: LoadedModel, latents: Tensor) -> Tensor:
    """(N, 3, H, W) pictures in 0..1."""
    vae: Any = model.modules["vae"]
    sample = vae.decode(
        torch.from_numpy(to_vae(image_spec(model, model.image_size), latents.float().cpu().numpy()))
    ).sample
    pictures: Tensor = (sample / 2 + 0.5).clamp(0, 1)
    return pictures


def _write(folder: Path, model: LoadedModel, student: Denoiser, request: DistillRequest) -> None:
    """The teacher's folder with the student's UNet, its schedule, and the biases for fewer steps."""
    elsewhere = [name for name, place in model.weights.items() if place != model.folder / name and name != "unet"]
    ignored = shutil.ignore_patterns(*OWN, *elsewhere)
    shutil.copytree(model.folder, folder, dirs_exist_ok=True, ignore=ignored)
    for name in elsewhere:
        saved: Any = model.modules[name].half()
        saved.save_pretrained(folder / name)
    biases = student.step_biases()
    unet = student.release()
    if request.lora_rank is not None:
        unet.fuse_lora()
        unet.unload_lora()
    unet.get_submodule(BIAS.rpartition(".")[0]).bias.data.copy_(biases[request.steps])
    unet.half().save_pretrained(folder / "unet")
    save_file(
        {str(count): biases[count].half().contiguous() for count in range(1, request.steps + 1)},
        folder / "unet" / STEP_BIASES_FILE,
    )
    spec = _noise_schedule(model)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": request.horizon,
        "beta_start": spec.beta_start,
        "beta_end": _beta_end(spec, request.horizon),
        "beta_schedule": spec.beta_schedule,
        "prediction_type": spec.prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "sampling.json").write_text(json.dumps({"steps": request.steps, "guidance_scale": 1.0}) + "\n")
