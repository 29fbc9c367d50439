# SPDX-License-Identifier: Apache-2.0
"""Every sampler against the diffusers scheduler of its name, through whole walks with the same noise."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from turbopocket.runtimes.errors import TurbopocketError
from turbopocket.runtimes.sampler import Memory, make_sampler
from turbopocket.runtimes.schedule import SCHEDULER_CLASSES, SamplerSpec, alphas_cumprod, timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", **BETAS}
SHAPE = (1, 4, 8, 8)


def spec_of(scheduler: Any, steps: int) -> SamplerSpec:
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    return SamplerSpec.from_scheduler_config(config, steps, guidance_scale=1.0)


def assert_walks_like(scheduler: Any, steps: int) -> None:
    """The pretended model answers with fixed numbers plus a tenth of its input, so that errors feed back."""
    sampler = make_sampler(spec_of(scheduler, steps))
    scheduler.set_timesteps(steps)
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    takes_noise = type(scheduler).__name__ in ("EulerAncestralDiscreteScheduler", "LCMScheduler")
    options = {"generator": theirs} if takes_noise else {}
    answers = torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = answers[0] * scheduler.init_noise_sigma
    found = answers[0].numpy() * np.float32(sampler.init_noise_sigma)
    memory = Memory()
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    for index, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(expected, timestep)
        ours_seen = sampler.scale_model_input(found, index)
        answer, our_answer = answers[index] + 0.1 * seen, answers[index].numpy() + np.float32(0.1) * ours_seen
        expected = scheduler.step(answer, timestep, expected, return_dict=False, **options)[0]
        found, memory = sampler.step(index, found, our_answer, memory, lambda s: torch.randn(s, generator=ours).numpy())
        assert found.dtype == np.float32
        assert_close(ours_seen, seen.numpy())
        assert_close(found, expected.numpy())


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of the largest value: latents start 14 times larger than they end."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_sampler_walks_like_the_scheduler_of_its_name(
    name: str, spacing: str, prediction_type: str, steps: int
) -> None:
    scheduler = getattr(diffusers, name)(
        timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1, **BETAS
    )
    assert_walks_like(scheduler, steps)


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_an_empty_config_means_the_defaults_of_the_scheduler_class(name: str) -> None:
    expected = spec_of(getattr(diffusers, name)(), steps=3)
    assert SamplerSpec.from_scheduler_config({"_class_name": name}, 3, 1.0) == expected
    assert_walks_like(getattr(diffusers, name)(), steps=3)


@pytest.mark.parametrize("options", [{"set_alpha_to_one": False}, {"clip_sample_range": 0.5, "clip_sample": True}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler"])
def test_clipping_and_the_last_alpha_are_followed(name: str, options: dict[str, Any]) -> None:
    assert_walks_like(getattr(diffusers, name)(**BETAS, **options), steps=4)


def test_lcm_follows_its_distillation_steps_and_timestep_scaling() -> None:
    assert_walks_like(diffusers.LCMScheduler(original_inference_steps=40, timestep_scaling=0.02, **BETAS), steps=4)


def test_a_shorter_schedule_is_followed() -> None:
    assert_walks_like(diffusers.DDIMScheduler(num_train_timesteps=100, **BETAS), steps=4)


def test_sdxl_turbo_asks_its_model_at_four_trailing_timesteps() -> None:
    assert SamplerSpec.from_scheduler_config(TURBO, 4, 0.0).timesteps == [999, 749, 499, 249]
    assert SamplerSpec.from_scheduler_config(TURBO, 1, 0.0).timesteps == [999]


def test_alphas_cumprod_are_those_of_diffusers_to_the_last_bits() -> None:
    expected = diffusers.DDIMScheduler(**BETAS).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(SamplerSpec.from_scheduler_config(TURBO, 1, 0)), expected, rtol=1e-6)


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


def test_unknown_scheduler_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TurbopocketError, match=r"'PNDMScheduler' has no sampler here: known are Euler.*LCM") as caught:
        SamplerSpec.from_scheduler_config({"_class_name": "PNDMScheduler"}, 4, 7.5)
    assert str(caught.value.hint).endswith("euler, euler_ancestral, ddim, lcm")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_karras_sigmas", True), ("rescale_betas_zero_snr", True), ("final_sigmas_type", "sigma_min")],
)
def test_settings_that_no_sampler_follows_are_refused(setting: str, value: object) -> None:
    with pytest.raises(TurbopocketError, match=f"{setting} = {value!r} is not supported: allowed is"):
        SamplerSpec.from_scheduler_config(TURBO | {setting: value}, 4, 0.0)


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
