# SPDX-License-Identifier: Apache-2.0
"""Every sampler against the diffusers scheduler of its name, through whole walks with the same noise."""

import tracemalloc
from typing import Any

import diffusers
import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.sampler import Memory, make_sampler
from turbopocket.runtimes.schedule import SamplerSpec, alphas_cumprod, timesteps
from turbopocket.runtimes.scheduler_classes import SCHEDULER_CLASSES

from .walks import BETAS, PUBLISHED, SHAPE, assert_walks_like, opened, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", **BETAS}
WITH_SAMPLER = [name for name, each in SCHEDULER_CLASSES.items() if each.kind]
PLMS = {"PNDMScheduler": {"skip_prk_steps": True}}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DPM = {
    "": {},
    "first order": {"solver_order": 1},
    "heun": {"solver_type": "heun"},
    "any order at the end": {"lower_order_final": False, **SIGMA_MIN},
    "euler at the end": {"euler_at_final": True, **SIGMA_MIN},
    "karras": {"use_karras_sigmas": True},
    "karras to sigma_min": {"use_karras_sigmas": True, **SIGMA_MIN},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "sde first order": {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    "sde heun karras": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
}
EULER = {
    "karras": {"use_karras_sigmas": True},
    "sigma_min": SIGMA_MIN,
    "both": {"use_karras_sigmas": True, **SIGMA_MIN},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_sampler_walks_like_the_scheduler_of_its_name(name: str, spacing: str, prediction_type: str) -> None:
    for steps in (1, 2, 4, 20, 50):
        scheduler = getattr(diffusers, name)(
            timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1, **BETAS, **PLMS.get(name, {})
        )
        assert_walks_like(scheduler, spec_of(scheduler, steps))


@pytest.mark.parametrize("name", [name for name in WITH_SAMPLER if name != "LCMScheduler"])
def test_a_thousand_steps_are_walked_alike(name: str) -> None:
    scheduler = getattr(diffusers, name)(timestep_spacing="trailing", **BETAS, **PLMS.get(name, {}))
    assert_walks_like(scheduler, spec_of(scheduler, 1000))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param("DPMSolverMultistepScheduler", options, id=f"dpm {how}") for how, options in DPM.items()),
        *(pytest.param("EulerDiscreteScheduler", options, id=f"euler {how}") for how, options in EULER.items()),
    ],
)
def test_solvers_and_sigmas_are_followed(name: str, options: dict[str, Any], spacing: str) -> None:
    for steps, prediction_type in [(1, "epsilon"), (2, "v_prediction"), (14, "epsilon"), (15, "v_prediction")]:
        scheduler = getattr(diffusers, name)(
            timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1, **BETAS, **options
        )
        assert_walks_like(scheduler, spec_of(scheduler, steps))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [name for name in WITH_SAMPLER if name != "PNDMScheduler"])
def test_zero_terminal_snr_is_followed(name: str, spacing: str) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    for steps in (1, 2, 4, 20, 50):
        scheduler = getattr(diffusers, name)(**options, **BETAS)
        assert_walks_like(scheduler, spec_of(scheduler, steps))


def test_noise_that_is_predicted_where_there_is_no_signal_is_refused() -> None:
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "_class_name": "DDIMScheduler", **BETAS}
    with pytest.raises(TurbopocketError, match="at timestep 999 there is no signal, where predicted noise tells"):
        SamplerSpec.from_scheduler_config(zero, 4, 1.0)
    leading = SamplerSpec.from_scheduler_config(zero | {"timestep_spacing": "leading"}, 4, 1.0)
    assert leading.timesteps[0] == 750
    with pytest.raises(ValueError, match="pndm divides by the share of signal, which rescale_betas_zero_snr makes 0"):
        SamplerSpec.model_validate(leading.model_dump() | {"kind": "pndm", "timesteps": []})


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_published_walk_like_diffusers(name: str) -> None:
    for steps in (1, 2, 4, 20, 30):
        spec = SamplerSpec.from_scheduler_config(PUBLISHED[name], steps, 1.0)
        assert_walks_like(opened(PUBLISHED[name]), spec)


def test_a_repeated_call_is_a_timestep_of_its_own() -> None:
    assert SamplerSpec.from_scheduler_config(PUBLISHED["sd-1.5"], 4, 7.5).timesteps == [751, 501, 501, 251, 1]
    assert SamplerSpec.from_scheduler_config(PUBLISHED["sd-1.5"], 1, 7.5).timesteps == [1]


def test_a_walk_leaves_the_memory_it_was_given_alone() -> None:
    sampler = make_sampler(SamplerSpec.from_scheduler_config(PUBLISHED["sd-1.5"], 3, 7.5))
    x_t, answer = np.ones(SHAPE, dtype=np.float32), np.full(SHAPE, 0.5, dtype=np.float32)
    after_one = sampler.step(0, x_t, answer, Memory(), np.ones)
    first, second = (sampler.step(1, after_one[0], answer, after_one[1], np.ones)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_an_empty_config_means_the_defaults_of_the_scheduler_class(name: str) -> None:
    scheduler = getattr(diffusers, name)(**PLMS.get(name, {}))
    found = SamplerSpec.from_scheduler_config({"_class_name": name, **PLMS.get(name, {})}, 3, 1.0)
    assert found == spec_of(scheduler, steps=3)
    assert_walks_like(scheduler, found)


@pytest.mark.parametrize("options", [{"set_alpha_to_one": False}, {"clip_sample_range": 0.5, "clip_sample": True}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler"])
def test_clipping_and_the_last_alpha_are_followed(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**BETAS, **options)
    assert_walks_like(scheduler, spec_of(scheduler, steps=4))


def test_pndm_ends_in_a_clean_sample_where_the_config_says_so() -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **BETAS)
    assert_walks_like(scheduler, spec_of(scheduler, steps=4))


def test_lcm_follows_its_distillation_steps_and_timestep_scaling() -> None:
    scheduler = diffusers.LCMScheduler(original_inference_steps=40, timestep_scaling=0.02, **BETAS)
    assert_walks_like(scheduler, spec_of(scheduler, steps=4))


@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_a_shorter_schedule_is_followed(name: str) -> None:
    scheduler = getattr(diffusers, name)(num_train_timesteps=100, **BETAS, **PLMS.get(name, {}))
    assert_walks_like(scheduler, spec_of(scheduler, steps=4))


def test_sdxl_turbo_asks_its_model_at_four_trailing_timesteps() -> None:
    assert SamplerSpec.from_scheduler_config(TURBO, 4, 0.0).timesteps == [999, 749, 499, 249]
    assert SamplerSpec.from_scheduler_config(TURBO, 1, 0.0).timesteps == [999]


def test_alphas_cumprod_are_those_of_diffusers_to_the_last_bits() -> None:
    expected = diffusers.DDIMScheduler(**BETAS).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(SamplerSpec.from_scheduler_config(TURBO, 1, 0.0)), expected, rtol=1e-6)


def test_there_are_always_as_many_timesteps_as_steps() -> None:
    """numpy's arange gives one too many at 61 steps and others, where diffusers ends at timestep -1."""
    spec = SamplerSpec.from_scheduler_config(TURBO, 1, 0.0)
    for steps in range(1, 1001):
        found = timesteps(spec, steps)
        assert len(found) == steps
        assert found[-1] >= 0


def test_noise_is_drawn_in_every_ancestral_step_but_the_last() -> None:
    draws = []
    sampler = make_sampler(SamplerSpec.from_scheduler_config(TURBO, 3, 0.0))
    x_t, memory = np.ones(SHAPE, dtype=np.float32), Memory()

    def noise(shape: tuple[int, ...]) -> np.ndarray:
        draws.append(shape)
        return np.zeros(shape, dtype=np.float32)

    for index in range(3):
        x_t, memory = sampler.step(index, x_t, x_t, memory, noise)
    assert draws == [SHAPE, SHAPE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type: Input should be 'epsilon' or 'v_prediction'"),
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule: Input should be 'linear' or 'scaled_linear'",
        ),
        (
            {"timestep_spacing": "leading", "steps_offset": 500},
            "steps_offset 500 start at timestep 1250, the model",
        ),
    ],
)
def test_values_that_no_sampler_follows_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        SamplerSpec.from_scheduler_config(TURBO | change, 4, 0.0)


def test_more_lcm_steps_than_it_was_distilled_for_are_refused() -> None:
    spec = SamplerSpec.from_scheduler_config({"_class_name": "LCMScheduler"}, 4, 1.0)
    with pytest.raises(TurbopocketError, match="sampler lcm: 51 LCM steps of 50 original_inference_steps of 1000"):
        make_sampler(spec, 51)


def test_timesteps_that_contradict_the_schedule_are_refused() -> None:
    spec = SamplerSpec.from_scheduler_config(TURBO, 2, 0.0)
    with pytest.raises(ValueError, match=r"timesteps are \[999.0, 0.0\], but 2 steps give \[999.0, 499.0\]"):
        SamplerSpec.model_validate(spec.model_dump() | {"timesteps": [999, 0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_timesteps": 2_000_000_000}, "num_train_timesteps: Input should be less than or equal to 10000"),
        ({"steps_offset": 10**30}, "steps_offset: Input should be"),
        ({"beta_end": 0.9}, "beta_start 0.00085 and beta_end 0.9 over 1000 timesteps leave one of them without"),
        ({"beta_start": 1e-9}, "beta_start 1e-09 and beta_end 0.012 over 1000 timesteps leave one of them without"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "needs a noise schedule that grows, over 1 "),
        ({"num_train_timesteps": True}, "num_train_timesteps: Input should be a valid integer"),
        ({"beta_start": "0.001"}, "beta_start: Input should be a valid number"),
        ({"beta_end": float("nan")}, "beta_end: Input should be"),
    ],
)
def test_numbers_that_are_no_noise_schedule_are_refused_before_there_are_tables(
    change: dict[str, Any], message: str
) -> None:
    tracemalloc.start()
    with pytest.raises(TurbopocketError, match=message):
        SamplerSpec.from_scheduler_config(TURBO | change, 1, 0.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize("steps", [100_000_000, 1001, 0, -1])
def test_more_steps_than_timesteps_are_refused_before_there_are_tables(steps: int) -> None:
    spec = SamplerSpec.from_scheduler_config(TURBO | {"num_train_timesteps": 10_000}, 4, 0.0)
    with pytest.raises(TurbopocketError, match=f"{steps} steps were asked, 1 to 1000 are possible"):
        make_sampler(spec, steps)
    with pytest.raises(TurbopocketError, match="steps: Input should be"):
        SamplerSpec.from_scheduler_config(TURBO, steps, 0.0)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_steps_too_fine_for_a_second_order_are_refused(spacing: str) -> None:
    """diffusers divides by the difference of two equal noise levels there, and draws NaN."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": spacing, **BETAS}
    with pytest.raises(TurbopocketError, match=f"1000 steps with {spacing} spacing ask at one timestep twice"):
        make_sampler(SamplerSpec.from_scheduler_config(config, 1000, 1.0))
