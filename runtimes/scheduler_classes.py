# SPDX-License-Identifier: Apache-2.0
"""diffusers' scheduler classes as data: every key of their configs, its default, and what is done about it here."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from ..ground.errors import TurbopocketError


@dataclass(frozen=True)
class SamplerTraits:
    """At which timesteps a kind of sampler asks, where kinds differ.

    Attributes:
        by_sigma: it computes with sigma, noise over signal; else with alpha, the share of signal.
        between_timesteps: with linspace spacing it asks between training timesteps as well.
        counts_its_end: the end of its walk is one of the evenly spaced points.
        karras: it follows `use_karras_sigmas`; karras_spans_training: from the first to the last sigma of training, and
            at whole timesteps; else between those of its own ends.
        distilled: its timesteps are every so many of those of a distillation, whatever the spacing says.
        asks_second_twice: its second timestep is asked twice.
        takes_zero_snr: it can start where there is no signal.
        any_model: it walks the noise schedule of every model, not only of those made for it.
    """

    by_sigma: bool = False
    between_timesteps: bool = False
    counts_its_end: bool = False
    karras: bool = False
    karras_spans_training: bool = False
    distilled: bool = False
    asks_second_twice: bool = False
    takes_zero_snr: bool = True
    any_model: bool = True


SAMPLER_KINDS: dict[str, SamplerTraits] = {
    "dpmpp_2m": SamplerTraits(by_sigma=True, counts_its_end=True, karras=True, karras_spans_training=True),
    "euler": SamplerTraits(by_sigma=True, between_timesteps=True, karras=True),
    "euler_ancestral": SamplerTraits(by_sigma=True, between_timesteps=True),
    "ddim": SamplerTraits(),
    "pndm": SamplerTraits(asks_second_twice=True, takes_zero_snr=False),
    "lcm": SamplerTraits(distilled=True, any_model=False),
}
"""Every kind of sampler by its name in recipes and manifests; those that walk any model first to be named first."""


def known_kind(kind: str) -> str:
    """The kind itself. Raises ValueError when there is no such sampler."""
    if kind not in SAMPLER_KINDS:
        raise ValueError(f"`{kind}` is not a sampler: known are {', '.join(SAMPLER_KINDS)}")
    return kind


SamplerKind = Annotated[str, AfterValidator(known_kind)]


@dataclass(frozen=True)
class SchedulerClass:
    """A class whose model was trained on betas, Ho et al.'s (arXiv 2006.11239) noise schedule.

    `defaults` has every key of its config, with what a config means that leaves it out. Without a sampler of its `kind`
    here, `stand_ins` can walk the same noise schedule: those that walk any model's, where it names none.
    """

    defaults: Mapping[str, Any]
    kind: str | None = None
    stand_ins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Key:
    """What is done about a key that a class reads: honoured, or refused unless its value is one of `only`.

    `of_model` keys say what the model was trained for, so another sampler must follow them as well: one that does not
    read the key takes only `only`. `no_effect` says why a key of any value changes nothing.
    """

    only: tuple[Any, ...] = ()
    because: str = ""
    of_model: bool = False
    honoured: bool = False
    no_effect: str = ""


_HONOURED, _OF_MODEL = Key(honoured=True), Key(honoured=True, of_model=True)
_FLOW = "the model was trained by flow matching, and samplers here need betas"
_UNUSED = "only read with thresholding, which is refused"

KEYS: dict[str, Key] = {
    "num_train_timesteps": _OF_MODEL,
    "beta_start": _OF_MODEL,
    "beta_end": _OF_MODEL,
    "beta_schedule": _OF_MODEL,
    "prediction_type": _OF_MODEL,
    "rescale_betas_zero_snr": Key(
        only=(False,), because="this sampler does not know zero terminal SNR", of_model=True, honoured=True
    ),
    "trained_betas": Key(only=(None,), because="betas come from a formula here", of_model=True),
    "timestep_type": Key(only=("discrete",), because="the model is told noise levels, not timesteps", of_model=True),
    "use_flow_sigmas": Key(only=(False,), because=_FLOW, of_model=True),
    "use_dynamic_shifting": Key(only=(False,), because=_FLOW, of_model=True),
    "variance_type": Key(
        only=(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        because="the model gives a variance as well",
        of_model=True,
    ),
    "timestep_spacing": _HONOURED,
    "steps_offset": _HONOURED,
    "clip_sample": _HONOURED,
    "clip_sample_range": _HONOURED,
    "set_alpha_to_one": _HONOURED,
    "use_karras_sigmas": _HONOURED,
    "final_sigmas_type": _HONOURED,
    "algorithm_type": _HONOURED,
    "solver_order": _HONOURED,
    "solver_type": _HONOURED,
    "lower_order_final": _HONOURED,
    "euler_at_final": _HONOURED,
    "original_inference_steps": _HONOURED,
    "timestep_scaling": _HONOURED,
    "skip_prk_steps": Key(only=(True,), because="PNDM is here without its Runge-Kutta steps"),
    "thresholding": Key(only=(False,), because="it is for pixels, not for latents"),
    "interpolation_type": Key(only=("linear",), because="sigmas are interpolated linearly here"),
    "use_exponential_sigmas": Key(only=(False,), because="Karras sigmas are the only others here"),
    "use_beta_sigmas": Key(only=(False,), because="Karras sigmas are the only others here"),
    "use_lu_lambdas": Key(only=(False,), because="Karras sigmas are the only others here"),
    "sigma_min": Key(only=(None,), because="sigmas end where the model's do"),
    "sigma_max": Key(only=(None,), because="sigmas start where the model's do"),
    "lambda_min_clipped": Key(only=(float("-inf"),), because="timesteps span all of training here"),
    "dynamic_thresholding_ratio": Key(no_effect=_UNUSED),
    "sample_max_value": Key(no_effect=_UNUSED),
    "flow_shift": Key(no_effect="only read with use_flow_sigmas, which is refused"),
    "time_shift_type": Key(no_effect="only read with use_dynamic_shifting, which is refused"),
}
"""Every key that a class with a sampler here reads."""
_FORMER_KEYS: dict[str, Key] = {
    "tensor_format": Key(no_effect="the arrays that the first releases of diffusers computed with"),
    "predict_epsilon": Key(only=(True,), because="`prediction_type` says it today", of_model=True),
}
"""What configs of early releases carry and no class reads any more."""

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW_SIGMAS = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFTING = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_DDIM = _BETAS | _LEADING | _THRESHOLDING | _CLIPPED | _ZERO_SNR
_LCM = (
    (_DDIM | _LATENT_BETAS)
    | {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True}
    | {"original_inference_steps": 50, "timestep_scaling": 10.0}
)
_SOLVER = _BETAS | _THRESHOLDING | _SIGMAS | _FLOW_SIGMAS | {"solver_order": 2, "lower_order_final": True}
_DPM = (_SOLVER | _SHIFTING) | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": float("-inf"),
    "variance_type": None,
}
_KDPM2 = _LATENT_BETAS | _SIGMAS | _LINSPACE

SCHEDULER_CLASSES: dict[str, SchedulerClass] = {
    "EulerDiscreteScheduler": SchedulerClass(
        (_BETAS | _SIGMAS | _LINSPACE | _ZERO_SNR)
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}
        | {"sigma_min": None, "sigma_max": None},
        "euler",
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(_BETAS | _LINSPACE | _ZERO_SNR, "euler_ancestral"),
    "DPMSolverMultistepScheduler": SchedulerClass(
        (_DPM | _LINSPACE | _ZERO_SNR) | {"euler_at_final": False, "use_lu_lambdas": False}, "dpmpp_2m"
    ),
    "PNDMScheduler": SchedulerClass((_BETAS | _LEADING) | {"skip_prk_steps": False, "set_alpha_to_one": False}, "pndm"),
    "DDIMScheduler": SchedulerClass(_DDIM | {"set_alpha_to_one": True}, "ddim"),
    "LCMScheduler": SchedulerClass(_LCM, "lcm"),
    "DDPMScheduler": SchedulerClass(_DDIM | {"variance_type": "fixed_small"}),
    "DEISMultistepScheduler": SchedulerClass(
        (_SOLVER | _LINSPACE | _SHIFTING) | {"algorithm_type": "deis", "solver_type": "logrho"}
    ),
    "DPMSolverSDEScheduler": SchedulerClass(_KDPM2 | {"noise_sampler_seed": None}),
    "DPMSolverSinglestepScheduler": SchedulerClass(_DPM | {"lower_order_final": False}),
    "HeunDiscreteScheduler": SchedulerClass(_KDPM2 | {"clip_sample": False, "clip_sample_range": 1.0}),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(_KDPM2),
    "KDPM2DiscreteScheduler": SchedulerClass(_KDPM2),
    "LMSDiscreteScheduler": SchedulerClass(_BETAS | _SIGMAS | _LINSPACE),
    "SASolverScheduler": SchedulerClass(
        (_BETAS | _THRESHOLDING | _SIGMAS | _FLOW_SIGMAS | _LINSPACE)
        | {"predictor_order": 2, "corrector_order": 2, "tau_func": None, "lower_order_final": True}
        | {"algorithm_type": "data_prediction", "lambda_min_clipped": float("-inf"), "variance_type": None}
    ),
    "TCDScheduler": SchedulerClass(_LCM, stand_ins=("lcm", "ddim")),
    "UniPCMultistepScheduler": SchedulerClass(
        (_SOLVER | _LINSPACE | _SHIFTING | _ZERO_SNR)
        | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None}
        | {"final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None, "shift_terminal": None}
    ),
}
_EDM, _BY_FLOW = "the sigmas of EDM (Karras et al. 2022)", "the straight lines of flow matching"
_OTHER_SCHEDULES: dict[str, str] = {
    "CosineDPMSolverMultistepScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "EDMEulerScheduler": _EDM,
    "FlowMatchEulerDiscreteScheduler": _BY_FLOW,
    "FlowMatchHeunDiscreteScheduler": _BY_FLOW,
    "FlowMatchLCMScheduler": _BY_FLOW,
}
_NAMES_ELSEWHERE: dict[str, dict[Any, str]] = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}
"""What DPM-Solver++ makes, in diffusers, of the values of DEIS and UniPC that share its keys."""


def sampler_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a SamplerSpec: the sampler that a `scheduler_config.json` describes.

    Raises TurbopocketError for a class whose noise schedule has no betas or is not known, or that has no sampler here,
    and by name for a key or value that would change the picture and is not followed.
    """
    name = _class_of(config)
    own = SCHEDULER_CLASSES[name]
    _refuse_another_model(name, config, own)
    if own.kind is None:
        raise TurbopocketError(
            f"scheduler class {name!r} has no sampler here",
            hint="choose another sampler on the same noise schedule: "
            f"in a recipe, `sampler.kind` = {', '.join(_stand_ins(own, config))}",
        )
    settings: dict[str, Any] = {"kind": own.kind}
    for key, default in own.defaults.items():
        value, rule = _stated(config, key, default), KEYS[key]
        if rule.honoured:
            settings[key] = value
        elif rule.only:
            _check_only(name, key, value, rule)
    clip, limit = settings.pop("clip_sample", False), settings.pop("clip_sample_range", None)
    return settings | {"clip_sample_range": limit if clip else None}


def config_for(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The config, with every key, of the class of `kind` on the noise schedule of another class's config.

    As in diffusers' `from_config`, keys that are stated and that it reads carry over, for others it has its own
    defaults. Unlike there, what the model was trained for stays what the config's class assumes where it states
    nothing. Raises TurbopocketError as `sampler_settings` does, and where the sampler does not know what the model was
    trained for.
    """
    owner = _class_of(config)
    name, other = _of_kind(kind)
    _refuse_another_model(owner, config, other)
    found: dict[str, Any] = {"_class_name": name}
    for key, default in other.defaults.items():
        rule = KEYS[key]
        if rule.of_model:
            default = SCHEDULER_CLASSES[owner].defaults.get(key, default)
        elif rule.only:  # the sampler here is meant, not what its class does by default
            default = rule.only[0]
        value = _stated(config, key, default)
        found[key] = _NAMES_ELSEWHERE.get(key, {}).get(value, value) if isinstance(value, str) else value
    return found


def _stated(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key, default)
    return False if value is None and isinstance(default, bool) else value


def has_no_betas(config: Mapping[str, Any]) -> bool:
    """Whether the config is of a class, known here, whose models were trained on another kind of noise schedule."""
    name = config.get("_class_name")
    return isinstance(name, str) and name in _OTHER_SCHEDULES


def _class_of(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULER_CLASSES | _OTHER_SCHEDULES:
        raise TurbopocketError(
            f"scheduler class {name!r} is not known here, so neither is the model's noise schedule: "
            f"known are {', '.join(SCHEDULER_CLASSES)}"
        )
    if has_no_betas(config):
        raise TurbopocketError(
            f"scheduler class {name!r}: the model was trained on {_OTHER_SCHEDULES[name]}, and samplers here need betas"
        )
    return name


def _refuse_another_model(owner: str, config: Mapping[str, Any], sampler: SchedulerClass) -> None:
    """Raises TurbopocketError for what the model was trained for, where `sampler` does not follow it, and for keys of
    no class that say something. A key of another known class stays in the file unread, in diffusers as here.
    """
    known = set(_FORMER_KEYS).union(*(each.defaults for each in SCHEDULER_CLASSES.values()))
    for key, value in config.items():
        says_nothing = value is None or value is False or value == []
        if key not in known and not key.startswith("_") and not says_nothing:
            raise TurbopocketError(f"{owner}: key `{key}` = {reprlib.repr(value)} is not known, nor what it changes")
    for key, rule in (KEYS | _FORMER_KEYS).items():
        if rule.of_model and rule.only and not (rule.honoured and key in sampler.defaults):
            default = SCHEDULER_CLASSES[owner].defaults.get(key, rule.only[0])
            _check_only(owner, key, config.get(key, default), rule)


def _check_only(name: str, key: str, value: Any, rule: Key) -> None:
    if value in rule.only or (value is None and False in rule.only):
        return
    allowed = " or ".join(map(repr, rule.only))
    raise TurbopocketError(
        f"{name}: {key} = {reprlib.repr(value)} is not supported, {rule.because}: allowed is {allowed}"
    )


def _of_kind(kind: str) -> tuple[str, SchedulerClass]:
    return next((name, each) for name, each in SCHEDULER_CLASSES.items() if each.kind == kind)


def _stand_ins(own: SchedulerClass, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that know zero terminal SNR where the config states it: of the model's keys the one that not all read."""
    key = "rescale_betas_zero_snr"
    any_model = [kind for kind, traits in SAMPLER_KINDS.items() if traits.any_model]
    return tuple(
        kind for kind in own.stand_ins or any_model if not config.get(key) or key in _of_kind(kind)[1].defaults
    )
