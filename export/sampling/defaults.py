# SPDX-License-Identifier: Apache-2.0
"""Steps and guidance that nobody stated: told from what a model says of itself, with a word on it, or asked for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...ground.errors import TurbopocketError
from ...runtimes.schedule import MAX_STEPS, SamplerSpec, validation_summary
from ..checkpoint.json_object import read_json_object
from ..families.base import LoadedModel
from ..recipe import MAX_GUIDANCE

SAMPLING_FILE = "sampling.json"
DEFAULT_STEPS = 30


class SamplingFile(BaseModel):
    """`sampling.json` of a model folder: what its maker wants it to be drawn with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None


class SamplingUnknown(TurbopocketError):
    """Neither the request nor the model tells with how many steps or how much guidance it is to be drawn."""


@dataclass(frozen=True)
class Published:
    """A kind of few-step checkpoint, and what its authors draw with; None where the kind alone does not tell.

    `pattern` is searched in names that are lower case, their words joined by `-`. Of `counts` there is one file each,
    whose name tells which. `sampler` are fields of a SamplerSpec that it was made for.
    """

    title: str
    pattern: str
    steps: int | None = None
    guidance: float | None = None
    counts: tuple[int, ...] = ()
    sampler: Mapping[str, str] = field(default_factory=dict)


TRAILING = {"timestep_spacing": "trailing"}
BY_LCM = {"kind": "lcm"}
FEW_STEPS = "some few-step kind"
LCM = Published("LCM", r"(^|-)lcm(-|$)", 4, 1.0, sampler=BY_LCM)
LCM_WITH_GUIDANCE_INPUT = Published("LCM", "", 4, 8.0, sampler=BY_LCM)
TCD = Published("TCD", r"(^|-)tcd(-|$)", 4, 0.0)
UNNAMED = Published(FEW_STEPS, r"turbo|lightning|(^|-)(hyper|pcm)(-|$)|(^|-)([1-9]|1[0-6])-?steps?(-|$)")
PUBLISHED = (
    Published("DreamShaper XL Turbo", r"dreamshaper.*turbo", 6, 2.0),
    Published("DreamShaper XL Lightning", r"dreamshaper.*lightning", 4, 2.0),
    Published("Turbo", r"^(stabilityai-)?sd(-?xl)?-turbo(-1-0)?(-(fp16|fp32|diffusers))*$", 1, 0.0, (), TRAILING),
    Published("SDXL-Lightning", r"sdxl-lightning", None, 0.0, (2, 4, 8), TRAILING),
    Published("Hyper-SD that takes guidance", r"hyper-?sd.*-cfg", None, None, (8, 12), TRAILING),
    Published("Hyper-SD", r"hyper-?sd", None, 0.0, (1, 2, 4, 8), TRAILING),
    Published("DMD2", r"(^|-)dmd2(-|$)", 4, 0.0, (1, 4), BY_LCM),
    LCM,
    Published("PCM", r"(^|-)pcm-.*smallcfg", None, 0.0, (2, 4, 8, 16), TRAILING),
    Published("PCM", r"(^|-)pcm-.*normalcfg", None, 7.5, (4, 8, 16), TRAILING),
    TCD,
    Published("Flash Diffusion", r"(^|-)flash-sd(xl)?(-|$)", 4, 0.0, sampler=BY_LCM),
    Published("SDXS", r"(^|-)sdxs(-|$)", 1, 0.0),
    UNNAMED,
)
"""The first that fits a name counts. Numbers are those of the model cards on the hub, PCM's of its authors' demo; fine-
tunes and merges that only have such a word in their names differ in both numbers, so they are asked for."""
BY_SCHEDULER = {"LCMScheduler": LCM, "TCDScheduler": TCD}
FEW_STEP_SPACING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler")


LORA_STEM = "pytorch_lora_weights"
"""What diffusers calls every LoRA that it saves; the folder or repository tells which one it is."""


@dataclass(frozen=True)
class Sign:
    """Where a model tells its kind, as a clause such as "its name is sdxl-turbo", and the numbers that go with it."""

    where: str
    kind: Published
    steps: int | None
    guidance: float | None


@dataclass(frozen=True)
class Sampling:
    """What a model is drawn with; `notes` say what of it was assumed, and from what."""

    steps: int
    guidance: float
    notes: tuple[str, ...]
    signs: tuple[Sign, ...]

    def sampler_notes(self, spec: SamplerSpec) -> tuple[str, ...]:
        """Returns a sentence for each setting of the sampler that is another than the model's kind was made for.

        The LCM sampler has no spacing: its steps are every so many of those of the distillation.
        """
        return tuple(
            dict.fromkeys(
                f"{sign.kind.title} was made for {key} {made_for}, this sampler has {getattr(spec, key)}: {sign.where}"
                for sign in self.signs
                for key, made_for in sign.kind.sampler.items()
                if getattr(spec, key) != made_for and not (key == "timestep_spacing" and spec.traits.distilled)
            )
        )


def sampling_of(
    model: LoadedModel, steps: int | None = None, guidance: float | None = None, lora: Sequence[Path] = ()
) -> Sampling:
    """Returns the given steps and guidance; one that is not given is the model's own, or its kind's.

    Its own is in `sampling.json`. Its kind is told by names (its own, where its UNet came from, LoRA files), else by
    its configs; a model without a sign of being made for few steps gets 30 steps and its pipeline's guidance. No
    weights are read. Raises SamplingUnknown when the signs do not tell a number or disagree on it, and TurbopocketError
    for a `sampling.json` that is none.
    """
    own = model_sampling(model)
    given = {
        "steps": own.steps if steps is None else steps,
        "guidance": own.guidance_scale if guidance is None else guidance,
    }
    signs = tuple(_named_signs(model, lora)) or tuple(_config_signs(model))
    usual = {"steps": DEFAULT_STEPS, "guidance": model.family.guidance}
    missing = [name for name, value in given.items() if value is None]
    assumed = {name: _shared(name, signs) if signs else usual[name] for name in missing}
    why = " and ".join(f"{sign.where} ({sign.kind.title})" for sign in signs)
    if unknown := [name for name, value in assumed.items() if value is None]:
        raise SamplingUnknown(
            f"{model.name} does not tell with how {_AMOUNTS[tuple(unknown)]} it is to be drawn: {why}",
            hint=f"give {' and '.join(f'--{name}' for name in unknown)}",
        )
    why = why or f"nothing says that {model.name} was made for few steps, and diffusers draws with that guidance"
    values: dict[str, Any] = {**given, **assumed}
    shown = " and ".join(f"{name} {values[name]:g}" for name in missing)
    return Sampling(values["steps"], values["guidance"], (f"{shown} assumed: {why}",) if missing else (), signs)


_AMOUNTS = {
    ("steps",): "many steps",
    ("guidance",): "much guidance",
    ("steps", "guidance"): "many steps and how much guidance",
}


def model_sampling(model: LoadedModel) -> SamplingFile:
    """Returns what the model folder's `sampling.json` says; nothing when the UNet is from elsewhere, or has none.

    Raises TurbopocketError naming the first thing in it that is not steps or guidance of a possible size.
    """
    path = model.folder / SAMPLING_FILE
    if not path.is_file() or model.weights[model.family.denoiser] != model.folder / model.family.denoiser:
        return SamplingFile()
    try:
        return SamplingFile.model_validate(read_json_object(path))
    except ValidationError as error:
        known = ", ".join(f"`{name}`" for name in SamplingFile.model_fields)
        raise TurbopocketError(f"{path}: {validation_summary(error)}; known are {known}") from error


def _shared(name: str, signs: Sequence[Sign]) -> float | None:
    """The number on which all signs agree; guidance of 0 and of 1 are the same, which is none."""
    values = [getattr(sign, name) for sign in signs]
    same = {value if value is None or name == "steps" else max(value, 1.0) for value in values}
    found: float | None = values[0] if len(same) == 1 else None
    return found


def _named_signs(model: LoadedModel, lora: Sequence[Path]) -> Iterator[Sign]:
    """Signs in the model's names, and in those of its LoRA files, each number and kind once."""
    config: Any = model.denoiser.config
    place = model.weights[model.family.denoiser]
    # A module's config is without it: it is about the file.
    origin = read_json_object(place / "config.json").get("_name_or_path") if place.is_dir() else None
    names = {
        _own_name(str(place)) if place.is_dir() else place.stem: "its name is {}",
        model.name: "its name is {}",
        _own_name(origin) if isinstance(origin, str) else "": "its UNet came from {}",
        **{_own_name(str(file.parent)) if file.stem == LORA_STEM else file.stem: "LoRA {}" for file in lora},
    }
    found: dict[tuple[object, ...], Sign] = {}
    for name, where in names.items():
        joined = re.sub(r"[^a-z0-9]+", "-", name.lower())
        kind = next((kind for kind in PUBLISHED if re.search(kind.pattern, joined)), None)
        if kind is None:
            continue
        if kind is LCM and config.get("time_cond_proj_dim"):
            kind = LCM_WITH_GUIDANCE_INPUT
        counts = [int(text) for text in re.findall(r"(?:^|-)(\d+)-?steps?(?:-|$)", joined)]
        steps = counts[0] if counts and counts[0] in kind.counts else kind.steps
        found.setdefault((kind.title, steps, kind.guidance), Sign(where.format(name), kind, steps, kind.guidance))
    yield from found.values()


def _own_name(path: str) -> str:
    """The part of a path, a hub id or a path into the hub's cache that names a model."""
    cached = re.search(r"models--[^/]+--([^/]+)", path)
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", "unet")]
    return cached[1] if cached else parts[-1] if parts else ""


def _config_signs(model: LoadedModel) -> Iterator[Sign]:
    """The sign in a model's configs, if there is one."""
    config: Any = model.denoiser.config
    scheduler = model.scheduler_config
    name = scheduler.get("_class_name")
    if config.get("time_cond_proj_dim"):
        kind, where = LCM_WITH_GUIDANCE_INPUT, "its UNet takes the guidance as an input"
    elif name in BY_SCHEDULER:
        kind, where = BY_SCHEDULER[name], f"its scheduler is {name}"
    elif (
        name in FEW_STEP_SPACING
        and scheduler.get("timestep_spacing") == "trailing"
        and not scheduler.get("rescale_betas_zero_snr")
    ):  # with zero terminal SNR the spacing is for any number of steps (Lin et al. 2023, arXiv 2305.08891, section 3.3)
        kind, where = UNNAMED, f"its {name} has timestep_spacing trailing"
    else:
        return
    yield Sign(where, kind, kind.steps, kind.guidance)
