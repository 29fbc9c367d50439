# SPDX-License-Identifier: Apache-2.0
"""Scheduler configs against diffusers' own classes: every key, every default, and other samplers on one schedule."""

import inspect
from typing import Any

import diffusers
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.schedule import SamplerSpec
from turbopocket.runtimes.scheduler_classes import KEYS, SCHEDULER_CLASSES, SamplerKind, config_for

from .drawing.walks import BETAS, PUBLISHED, assert_walks_like, opened

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

CLASS_OF: dict[str, str] = {each.kind: name for name, each in SCHEDULER_CLASSES.items() if each.kind}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
NEEDS_A_PACKAGE = "DPMSolverSDEScheduler"  # diffusers shows its keys only where torchsde is installed


def read(config: dict[str, Any], kind: SamplerKind | None = None, steps: int = 4) -> SamplerSpec:
    return SamplerSpec.from_scheduler_config(config if kind is None else config_for(config, kind), steps, 1.0)


@pytest.mark.parametrize("name", [name for name in SCHEDULER_CLASSES if name != NEEDS_A_PACKAGE])
def test_keys_and_defaults_are_those_of_diffusers(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    expected = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert SCHEDULER_CLASSES[name].defaults == expected


def test_something_is_done_about_every_key_that_a_sampler_reads() -> None:
    for each in SCHEDULER_CLASSES.values():
        assert set(each.defaults) <= set(KEYS) or each.kind is None
    for key, rule in KEYS.items():
        assert rule.honoured or rule.no_effect or (rule.only and rule.because), key


@pytest.mark.parametrize("kind", CLASS_OF)
@pytest.mark.parametrize("model", PUBLISHED)
def test_another_sampler_walks_like_the_scheduler_made_from_the_config(model: str, kind: SamplerKind) -> None:
    """What is stated and read carries over, with hidden keys of other classes, and defaults that were not stated do
    not: SD 1.5's folder has no spacing, SDXL's has DDIM's `set_alpha_to_one`."""
    scheduler = opened(PUBLISHED[model], CLASS_OF[kind])
    if kind == "pndm":
        scheduler = diffusers.PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)
    for steps in (1, 4, 20):
        assert_walks_like(scheduler, read(PUBLISHED[model], kind, steps))


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("UniPCMultistepScheduler", {"solver_type": "bh2", "use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        (
            "DEISMultistepScheduler",
            {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
        ),
        ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}),
        ("TCDScheduler", {"steps_offset": 1}),
        ("DPMSolverSinglestepScheduler", {"lower_order_final": False, **SIGMA_MIN}),
    ],
)
def test_folders_of_classes_without_a_sampler_are_walked_by_another(name: str, stated: dict[str, Any]) -> None:
    config = {"_class_name": name, **BETAS, **stated}
    for kind in ("dpmpp_2m", "euler", "ddim"):
        assert_walks_like(opened(config, CLASS_OF[kind]), read(config, kind, 20))


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_another_sampler_keeps_the_noise_schedule_that_the_folders_class_assumes(name: str) -> None:
    """A config without betas means those of its own class; diffusers' `from_config` takes those of the other class."""
    own = SCHEDULER_CLASSES[name].defaults
    for kind in CLASS_OF:
        found = read({"_class_name": name, "prediction_type": "v_prediction"}, kind)
        assert (found.beta_start, found.beta_end) == (own["beta_start"], own["beta_end"])
        assert (found.beta_schedule, found.prediction_type) == (own["beta_schedule"], "v_prediction")


@pytest.mark.parametrize("kind", [None, *CLASS_OF])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0},
            r"on the sigmas of EDM \(Karras",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler': the model was trained on the sigmas of EDM"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            "straight lines of flow matching",
        ),
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "straight lines of flow matching, and samplers",
        ),
        (
            {"_class_name": "CMStochasticIterativeScheduler"},
            "'CMStochasticIterativeScheduler' is not known",
        ),
        ({"_class_name": None}, "scheduler class None is not known here, so neither is the model's noise schedule"),
        ({"_class_name": ["DDIMScheduler"]}, r"scheduler class \['DDIMScheduler'\] is not known here"),
        ({}, "scheduler class None is not known here"),
        (
            {"use_flow_sigmas": True, "flow_shift": 3.0},
            "use_flow_sigmas = True is not supported, the model was",
        ),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True is not supported, the model was trained by flow"),
        ({"timestep_type": "continuous"}, "timestep_type = 'continuous' is not supported, the model is told noise le"),
        ({"variance_type": "learned_range"}, "variance_type = 'learned_range' is not supported, the model gives a var"),
        ({"trained_betas": [0.1] * 1000}, r"trained_betas = \[0.1, .*\.\.\.\] is not supported, betas come from a for"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: Input should be 'epsilon' or 'v_prediction'"),
        ({"predict_epsilon": False}, "predict_epsilon = False is not supported, `prediction_type` says it today"),
    ],
)
def test_models_of_another_noise_schedule_are_refused_whichever_sampler_is_asked(
    config: dict[str, Any], message: str, kind: SamplerKind | None
) -> None:
    """A hint to choose another sampler would end in a picture from betas that nobody stated."""
    known = {} if "_class_name" in config or not config else {"_class_name": "DPMSolverMultistepScheduler", **BETAS}
    with pytest.raises(TurbopocketError, match=message) as caught:
        read({**known, **config}, kind)
    assert caught.value.hint is None


@pytest.mark.parametrize("name", [name for name, each in SCHEDULER_CLASSES.items() if each.kind is None])
def test_classes_without_a_sampler_are_refused_with_those_that_can_stand_in(name: str) -> None:
    with pytest.raises(TurbopocketError, match=f"scheduler class '{name}' has no sampler here") as caught:
        read({"_class_name": name, **BETAS})
    kinds = "lcm, ddim" if name == "TCDScheduler" else "dpmpp_2m, euler, euler_ancestral, ddim, pndm"
    assert str(caught.value.hint) == (
        f"choose another sampler on the same noise schedule: in a recipe, `sampler.kind` = {kinds}"
    )


def test_only_samplers_that_know_zero_terminal_snr_can_stand_in_for_it() -> None:
    config = {"_class_name": "UniPCMultistepScheduler", "rescale_betas_zero_snr": True, **BETAS}
    with pytest.raises(TurbopocketError) as caught:
        read(config)
    assert str(caught.value.hint).endswith("= dpmpp_2m, euler, euler_ancestral, ddim")
    with pytest.raises(TurbopocketError, match="rescale_betas_zero_snr = True is not supported, this sampler does not"):
        read(config, "pndm")
    assert read(config, "dpmpp_2m").rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True, "False"),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True, "False"),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear", "'linear'"),
        ("EulerDiscreteScheduler", "sigma_max", 700.0, "None"),
        ("DDIMScheduler", "thresholding", True, "False"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True, "False"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1, "-inf"),
        ("PNDMScheduler", "skip_prk_steps", False, "True"),
    ],
)
def test_values_that_no_sampler_follows_are_refused_by_name(name: str, key: str, value: Any, allowed: str) -> None:
    with pytest.raises(
        TurbopocketError, match=rf"^{name}: {key} = {value!r} is not supported, .*: allowed is {allowed}$"
    ):
        read({"_class_name": name, **BETAS, key: value})


def test_the_runge_kutta_steps_that_an_unstated_default_means_are_refused() -> None:
    with pytest.raises(TurbopocketError, match="skip_prk_steps = False is not supported, PNDM is here without its Run"):
        read({"_class_name": "PNDMScheduler", **BETAS})


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
@pytest.mark.parametrize(("key", "value"), [("sigma_warp", 2.0), ("shift", 3.0), ("use_new_sigmas", True)])
def test_a_key_that_no_class_reads_is_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(TurbopocketError, match=f"{name}: key `{key}` = {value!r} is not known, nor what it changes"):
        read({"_class_name": name, **BETAS, key: value}, "euler")


def test_keys_without_effect_are_left_alone() -> None:
    config = {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS}
    of_elsewhere = {"_diffusers_version": "0.1", "sample_max_value": 2.0, "use_karras_sigmas": True}
    former = {"tensor_format": "pt", "predict_epsilon": True}
    that_say_nothing = {"sigma_warp": None, "use_new_sigmas": False, "rescale_betas_zero_snr": None}
    assert read(config | of_elsewhere | former | that_say_nothing) == read(config)
