# SPDX-License-Identifier: Apache-2.0
"""Walks that begin in the middle, to change a picture: against diffusers' image-to-image pipelines' own start."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.sampler import Sampler, make_sampler
from turbopocket.runtimes.schedule import SamplerSpec

from .walks import BETAS, PUBLISHED, SHAPE, assert_walks_like, opened

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

V_PREDICTION = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
CONFIGS: dict[str, dict[str, Any]] = PUBLISHED | {
    "dpm": {"_class_name": "DPMSolverMultistepScheduler", **BETAS},
    "dpm sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", **BETAS},
    "euler karras": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, **BETAS},
    "ddim zero snr": {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, **V_PREDICTION, **BETAS},
    "pndm trailing": {**PUBLISHED["sd-1.5"], **V_PREDICTION},
}


def sampler_of(name: str, steps: int) -> Sampler:
    return make_sampler(SamplerSpec.from_scheduler_config(CONFIGS[name], steps, 1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_begins_where_diffusers_begins(name: str) -> None:
    for steps in (1, 2, 4, 20, 50):
        scheduler = opened(CONFIGS[name])
        scheduler.set_timesteps(steps)
        for strength in (0.03, 0.25, 0.29, 0.5, 0.75, 0.8, 0.99, 1.0):
            pipeline: Any = SimpleNamespace(scheduler=scheduler)
            left, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
            if int(steps * strength) < 1:  # diffusers has nothing left, with PNDM its last call
                with pytest.raises(TurbopocketError, match=f"strength {strength:g} leaves none of {steps} steps"):
                    sampler_of(name, steps).start_index(strength)
            else:
                sampler = sampler_of(name, steps)
                assert len(sampler.timesteps[sampler.start_index(strength) :]) == len(left)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.96, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_from_the_middle_goes_like_diffusers(name: str, strength: float) -> None:
    """With an empty memory there, and PNDM's second call done twice where the walk begins."""
    start = sampler_of(name, 25).start_index(strength)
    assert_walks_like(opened(CONFIGS[name]), SamplerSpec.from_scheduler_config(CONFIGS[name], 25, 1.0), start)


@pytest.mark.parametrize("name", CONFIGS)
def test_noise_is_added_as_at_the_first_call_of_a_whole_walk(name: str) -> None:
    scheduler, sampler = opened(CONFIGS[name]), sampler_of(name, 4)
    scheduler.set_timesteps(4)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    expected = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    np.testing.assert_allclose(sampler.add_noise(clean.numpy(), noise.numpy(), 0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_strength_that_is_no_share_of_a_walk_is_refused(strength: float) -> None:
    with pytest.raises(TurbopocketError, match="strength .* was asked: it must be above 0, and 1 at most"):
        sampler_of("sdxl", 4).start_index(strength)
