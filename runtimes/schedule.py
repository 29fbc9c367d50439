# SPDX-License-Identifier: Apache-2.0
"""The constants of a sampler: which noise levels a model was trained on, and at which of them it is asked."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..ground.errors import TurbopocketError
from .scheduler_classes import SAMPLER_KINDS, SamplerKind, SamplerTraits, sampler_settings

Floats = NDArray[np.floating[Any]]
Spacing = Literal["leading", "trailing", "linspace"]

MAX_TRAIN_TIMESTEPS = 10_000
"""Ten times what any published model was trained with; every table here has one number per training timestep."""
MAX_STEPS = 1000
"""As many as published models have training timesteps: more would ask at the same ones again."""
_ALMOST_NO_SIGNAL = np.float32(2**-24)
"""Stands for a zero share of signal where sigma = sqrt((1 - alpha) / alpha) must stay finite, as in diffusers."""
_KARRAS_RHO = 7.0


class SamplerSpec(BaseModel):
    """Everything a reader needs to step a model from noise to a picture, whatever its language.

    `timesteps` are the numbers handed to the model, one a call, in order; left out, they are computed, and given ones
    must equal the computed ones. There are as many as `steps`, for `pndm` one more, its second asked twice. Fields are
    named as in diffusers: `rescale_betas_zero_snr` leaves no signal at the last training timestep (Lin et al. 2023,
    arXiv 2305.08891, algorithm 1); `use_karras_sigmas` (Euler, DPM-Solver++) spaces steps by noise level instead of by
    time (Karras et al. 2022, arXiv 2206.00364, equation 5), and `final_sigmas_type` says whether the same two end
    in a clean sample or at the noise of timestep 0. `clip_sample_range` bounds the predicted clean latents (None: no
    bound) and is for DDIM and LCM; `set_alpha_to_one` says that DDIM and PNDM end in a clean sample;
    `original_inference_steps` and `timestep_scaling` belong to LCM, `algorithm_type`, `solver_order`, `solver_type`,
    `lower_order_final` and `euler_at_final` to DPM-Solver++.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    kind: SamplerKind
    num_train_timesteps: int = Field(default=1000, ge=1, le=MAX_TRAIN_TIMESTEPS)
    beta_start: float = Field(gt=0, lt=1)
    beta_end: float = Field(gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"]
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing
    steps_offset: int = Field(default=0, ge=0, le=MAX_TRAIN_TIMESTEPS)
    use_karras_sigmas: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    set_alpha_to_one: bool = True
    clip_sample_range: float | None = Field(default=None, gt=0)
    original_inference_steps: int = Field(default=50, ge=1)
    timestep_scaling: float = Field(default=10.0, gt=0, le=1e6)
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_order: Literal[1, 2] = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(ge=0)
    timesteps: list[float] = []

    @model_validator(mode="after")
    def _has_a_noise_schedule(self) -> "SamplerSpec":
        if self.rescale_betas_zero_snr and not self.traits.takes_zero_snr:
            raise ValueError(f"{self.kind} divides by the share of signal, which rescale_betas_zero_snr makes 0")
        alphas = alphas_cumprod(self)
        noisy = alphas[:-1] if self.rescale_betas_zero_snr else alphas
        if not (np.isfinite(alphas).all() and (noisy > 0).all() and (noisy < 1).all()):
            raise ValueError(
                f"beta_start {self.beta_start:g} and beta_end {self.beta_end:g} over {self.num_train_timesteps} "
                "timesteps leave one of them without noise or without signal in float32"
            )
        return self

    @model_validator(mode="after")
    def _fill_timesteps(self) -> "SamplerSpec":
        expected = timesteps(self, self.steps).tolist()
        if not self.timesteps:
            object.__setattr__(self, "timesteps", expected)
        elif len(self.timesteps) != len(expected) or not np.allclose(self.timesteps, expected, atol=1e-4):
            raise ValueError(f"timesteps are {self.timesteps}, but {self.steps} steps give {expected}")
        return self

    @property
    def traits(self) -> SamplerTraits:
        """What tells its kind from others."""
        return SAMPLER_KINDS[self.kind]

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], steps: int, guidance_scale: float) -> "SamplerSpec":
        """The sampler that a diffusers `scheduler_config.json` describes.

        What the config leaves out are the scheduler class's own defaults. Raises TurbopocketError for a class or a
        setting that no sampler here reproduces.
        """
        settings = sampler_settings(config)
        try:
            return cls(steps=steps, guidance_scale=guidance_scale, **settings)
        except ValueError as error:
            raise TurbopocketError(f"{config['_class_name']}: {validation_summary(error)}") from error


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
    alphas = _product(1 - betas)
    return _without_signal_at_the_end(spec, alphas) if spec.rescale_betas_zero_snr else alphas


def _product(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def _without_signal_at_the_end(spec: SamplerSpec, alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shifts and scales sqrt(alpha) so that it starts where it did and ends at 0 (Lin et al. 2023, algorithm 1)."""
    if len(alphas) < 2 or alphas[0] == alphas[-1]:
        raise ValueError(f"rescale_betas_zero_snr needs a noise schedule that grows, over {len(alphas)} timesteps")
    signal = np.sqrt(alphas)
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    # by way of betas as diffusers goes, so that both round alike
    kept = np.square(signal)
    betas = 1 - np.append(kept[:1], kept[1:] / kept[:-1])
    rescaled = _product(1 - betas)
    if spec.traits.by_sigma:
        rescaled[-1] = _ALMOST_NO_SIGNAL
    return rescaled


def timesteps(spec: SamplerSpec, steps: int) -> NDArray[np.float32]:
    """The training timesteps at which the model is asked, noisiest first, one a call: `steps`, for PNDM one more.

    They are whole numbers, except for Euler's linspace and Karras sigmas. Spacings are those of Lin et al. 2023
    (arXiv 2305.08891, table 2); DPM-Solver++ counts its end as a point of them. LCM takes every k-th step of its
    distillation schedule (Luo et al. 2023, arXiv 2310.04378); PNDM repeats its second call. Raises ValueError when
    there are more steps than timesteps.
    """
    count = spec.num_train_timesteps
    if not 1 <= steps <= min(count, MAX_STEPS):
        raise ValueError(f"{steps} steps were asked, 1 to {min(count, MAX_STEPS)} are possible")
    chosen = _lcm_timesteps(spec, steps) if spec.traits.distilled else _spaced_timesteps(spec, steps)
    if chosen[0] >= count:
        raise ValueError(
            f"{steps} steps with steps_offset {spec.steps_offset} start at timestep {chosen[0]:g}, "
            f"the model knows 0 to {count - 1}"
        )
    blind = spec.rescale_betas_zero_snr and spec.prediction_type == "epsilon" and not spec.traits.by_sigma
    if blind and chosen[0] == count - 1:
        raise ValueError(f"at timestep {count - 1} there is no signal, where predicted noise tells nothing")
    if _follows_karras(spec):
        chosen = _timesteps_of(spec, _karras_sigmas(spec, chosen))
    elif spec.traits.asks_second_twice:
        chosen = np.concatenate([chosen[:2], chosen[1:]])
    return chosen.astype(np.float32)


def sigmas(spec: SamplerSpec, steps: int) -> NDArray[np.float32]:
    """Noise over signal, [steps + 1], at each call and where the last one leads; for Euler and DPM-Solver++."""
    known = _training_sigmas(spec)
    if _follows_karras(spec):
        asked = _karras_sigmas(spec, _spaced_timesteps(spec, steps))
    else:
        asked = np.interp(timesteps(spec, steps), np.arange(len(known)), known)
    return np.append(asked, known[0] if spec.final_sigmas_type == "sigma_min" else 0).astype(np.float32)


def _follows_karras(spec: SamplerSpec) -> bool:
    return spec.use_karras_sigmas and spec.traits.karras


def _training_sigmas(spec: SamplerSpec) -> NDArray[np.float32]:
    alphas = alphas_cumprod(spec)
    return np.sqrt((1 - alphas) / alphas)


def _karras_sigmas(spec: SamplerSpec, spaced: Floats) -> Floats:
    """As many sigmas as `spaced` has timesteps, between those of its ends, for DPM-Solver++ those of all training."""
    known = _training_sigmas(spec)
    ends = np.array([len(known) - 1, 0]) if spec.traits.karras_spans_training else spaced[[0, -1]]
    largest, smallest = np.interp(ends, np.arange(len(known)), known) ** (1 / _KARRAS_RHO)
    karras: Floats = (largest + np.linspace(0, 1, len(spaced)) * (smallest - largest)) ** _KARRAS_RHO
    return karras


def _timesteps_of(spec: SamplerSpec, asked: Floats) -> Floats:
    """The timesteps whose noise is `asked`, between training timesteps by the logarithm of sigma.

    Logarithms are float64, so that no machine rounds a timestep of DPM-Solver++ the other way.
    """
    known = _training_sigmas(spec).astype(np.float64)
    found = np.interp(np.log(asked), np.log(known), np.arange(len(known), dtype=np.float64))
    return found.round() if spec.traits.karras_spans_training else found


def _spaced_timesteps(spec: SamplerSpec, steps: int) -> Floats:
    count, ends_on_grid = spec.num_train_timesteps, spec.traits.counts_its_end
    if spec.timestep_spacing == "linspace":
        spaced = np.linspace(0, count - 1, steps + ends_on_grid)[::-1][:steps]
        return spaced if spec.traits.between_timesteps else spaced.round()
    if spec.timestep_spacing == "leading":
        strides = np.arange(steps)[::-1] + ends_on_grid
        return (strides * (count // (steps + ends_on_grid)) + spec.steps_offset).astype(np.float64)
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
