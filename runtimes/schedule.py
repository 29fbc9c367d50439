# SPDX-License-Identifier: Apache-2.0
"""The constants of a sampler: which noise levels a model was trained on, and at which of them it is asked."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import TurbopocketError

Floats = NDArray[np.floating[Any]]
SamplerKind = Literal["euler", "euler_ancestral", "ddim", "lcm"]
Spacing = Literal["leading", "trailing", "linspace"]

# What diffusers assumes where a scheduler_config.json is silent; each class assumes something else.
_SHARED_DEFAULTS = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 0}
_EULER_DEFAULTS = _SHARED_DEFAULTS | {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
}
_DDIM_DEFAULTS = _EULER_DEFAULTS | {
    "timestep_spacing": "leading",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
}
_LCM_DEFAULTS = _DDIM_DEFAULTS | {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
SCHEDULER_CLASSES: dict[str, tuple[SamplerKind, dict[str, Any]]] = {
    "EulerDiscreteScheduler": ("euler", _EULER_DEFAULTS),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", _EULER_DEFAULTS),
    "DDIMScheduler": ("ddim", _DDIM_DEFAULTS),
    "LCMScheduler": ("lcm", _LCM_DEFAULTS),
}
# Settings that change the numbers and that no sampler here knows: (key, the only value that is accepted).
_ONLY_VALUES: dict[str, Any] = {
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}


class SamplerSpec(BaseModel):
    """Everything a reader needs to step a model from noise to a picture, whatever its language.

    `timesteps` are the `steps` numbers handed to the model, in order; left out, they are computed, and given
    ones must equal the computed ones. `clip_sample_range` bounds the predicted clean latents (None: no bound)
    and is for DDIM and LCM; `set_alpha_to_one` says that DDIM ends in a clean sample;
    `original_inference_steps` and `timestep_scaling` belong to LCM.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: SamplerKind
    num_train_timesteps: int = Field(default=1000, ge=1)
    beta_start: float = Field(gt=0, lt=1)
    beta_end: float = Field(gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing
    steps_offset: int = Field(default=0, ge=0)
    set_alpha_to_one: bool = True
    clip_sample_range: float | None = Field(default=None, gt=0)
    original_inference_steps: int = Field(default=50, ge=1)
    timestep_scaling: float = Field(default=10.0, gt=0)
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    timesteps: list[float] = []

    @model_validator(mode="after")
    def _fill_timesteps(self) -> "SamplerSpec":
        expected = timesteps(self, self.steps).tolist()
        if not self.timesteps:
            object.__setattr__(self, "timesteps", expected)
        elif len(self.timesteps) != self.steps or not np.allclose(self.timesteps, expected, rtol=1e-6):
            raise ValueError(f"timesteps are {self.timesteps}, but {self.steps} steps give {expected}")
        return self

    @classmethod
    def from_scheduler_config(
        cls,
        config: Mapping[str, Any],
        steps: int,
        guidance_scale: float,
    ) -> "SamplerSpec":
        """The sampler that a diffusers `scheduler_config.json` describes.

        What the config leaves out are the scheduler class's own defaults. Raises TurbopocketError for a class
        or a setting that no sampler here reproduces.
        """
        name = config.get("_class_name")
        if name not in SCHEDULER_CLASSES:
            kinds = [kind for kind, _ in SCHEDULER_CLASSES.values()]
            raise TurbopocketError(
                f"scheduler class {name!r} has no sampler here: known are {', '.join(SCHEDULER_CLASSES)}",
                hint=f"choose another sampler on the same noise schedule: {', '.join(kinds)}",
            )
        for key, only in _ONLY_VALUES.items():
            if config.get(key, only) != only and config[key] is not None:
                raise TurbopocketError(f"{name}: {key} = {config[key]!r} is not supported: allowed is {only!r}")
        kind, defaults = SCHEDULER_CLASSES[name]
        known = {key: config.get(key, default) for key, default in defaults.items()}
        clip, clip_range = known.pop("clip_sample", False), known.pop("clip_sample_range", None)
        try:
            return cls(
                kind=kind,
                clip_sample_range=clip_range if clip else None,
                steps=steps,
                guidance_scale=guidance_scale,
                **known,
            )
        except ValueError as error:
            raise TurbopocketError(f"{name}: {validation_summary(error)}") from error


def validation_summary(error: ValueError) -> str:
    """One line naming the field and the fault of the first thing pydantic found."""
    errors: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    found = errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{more}"


def alphas_cumprod(spec: SamplerSpec) -> NDArray[np.float32]:
    """Share of signal variance left at each training timestep, [num_train_timesteps], falling from about 1.

    float32 with the product carried in float64, which is what PyTorch's CPU `cumprod` does.
    """
    count = spec.num_train_timesteps
    if spec.beta_schedule == "linear":
        betas = np.linspace(spec.beta_start, spec.beta_end, count).astype(np.float32)
    else:
        betas = np.square(np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, count).astype(np.float32))
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def timesteps(spec: SamplerSpec, steps: int) -> NDArray[np.float32]:
    """The `steps` training timesteps at which the model is asked, noisiest first.

    They are whole numbers, except for Euler's linspace. Spacings are those of Lin et al. 2023
    (arXiv 2305.08891, table 2); LCM takes every k-th step of its distillation schedule (Luo et al. 2023,
    arXiv 2310.04378). Raises ValueError when there are more steps than timesteps.
    """
    if not 1 <= steps <= spec.num_train_timesteps:
        raise ValueError(f"{steps} steps were asked, 1 to {spec.num_train_timesteps} are possible")
    chosen = _lcm_timesteps(spec, steps) if spec.kind == "lcm" else _spaced_timesteps(spec, steps)
    if chosen[0] >= spec.num_train_timesteps:
        raise ValueError(
            f"{steps} steps with steps_offset {spec.steps_offset} start at timestep {chosen[0]:g}, "
            f"the model knows 0 to {spec.num_train_timesteps - 1}"
        )
    return chosen.astype(np.float32)


def _spaced_timesteps(spec: SamplerSpec, steps: int) -> Floats:
    count = spec.num_train_timesteps
    if spec.timestep_spacing == "linspace":
        spaced = np.linspace(0, count - 1, steps)[::-1]
        return spaced.round() if spec.kind == "ddim" else spaced
    if spec.timestep_spacing == "leading":
        return (np.arange(steps)[::-1] * (count // steps) + spec.steps_offset).astype(np.float64)
    return (count - np.arange(steps) * (count / steps)).round() - 1


def _lcm_timesteps(spec: SamplerSpec, steps: int) -> Floats:
    original = spec.original_inference_steps
    if steps > original or original > spec.num_train_timesteps:
        raise ValueError(
            f"{steps} LCM steps of {original} original_inference_steps of {spec.num_train_timesteps} "
            "timesteps: each must not exceed the next"
        )
    distilled = (np.arange(1, original + 1) * (spec.num_train_timesteps // original) - 1)[::-1]
    return distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].astype(np.float64)
