# SPDX-License-Identifier: Apache-2.0
"""Whole walks of a sampler here and of a scheduler of diffusers, from the same latents, answers and noise."""

from typing import Any

import diffusers
import numpy as np
import torch

from turbopocket.runtimes.drawing.sampler import Memory, make_sampler
from turbopocket.runtimes.schedule import SamplerSpec

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (1, 4, 8, 8)
# Configs as they were published with the models, whole.
_SD = {
    **BETAS,
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
_SDXL = {
    **_SD,
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd-1.5": _SD,
    "sd-2.1": {**_SD, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sd-2.1-base": {**_SD, "prediction_type": "epsilon"},
    "sd-turbo": {**_SDXL, "timestep_spacing": "trailing"},
    "sdxl": _SDXL,
    "sdxl-turbo": {**_SDXL, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "ssd-1b": {**_SDXL, "_diffusers_version": "0.22.0.dev0"},
    "lcm-dreamshaper": {
        **BETAS,
        "_class_name": "LCMScheduler",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
    "dpm-karras": {
        **_SD,
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "timestep_spacing": "leading",
        "use_karras_sigmas": True,
        "variance_type": None,
    },
}


def opened(config: dict[str, Any], name: str | None = None) -> Any:
    """The scheduler of a config, or one of class `name` made from it as diffusers' users do."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return scheduler if name is None else getattr(diffusers, name).from_config(scheduler.config)


def spec_of(scheduler: Any, steps: int) -> SamplerSpec:
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    return SamplerSpec.from_scheduler_config(config, steps, guidance_scale=1.0)


def assert_walks_like(scheduler: Any, spec: SamplerSpec, start: int = 0) -> None:
    """The pretended model answers with fixed numbers plus a tenth of its input, so that errors feed back.

    A walk from `start` above 0 begins, as for a picture to change, with noised clean latents.
    """
    sampler, memory = make_sampler(spec), Memory()
    scheduler.set_timesteps(spec.steps)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(spec.timesteps, sampler.timesteps, rtol=1e-6)
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    draws = "EulerAncestral" in type(scheduler).__name__ or "LCM" in type(scheduler).__name__
    draws = draws or scheduler.config.get("algorithm_type") == "sde-dpmsolver++"
    options = {"generator": theirs} if draws else {}
    answers = torch.randn(len(scheduler.timesteps), *SHAPE, generator=torch.Generator().manual_seed(0))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    expected = answers[0] * scheduler.init_noise_sigma
    found = answers[0].numpy() * np.float32(sampler.init_noise_sigma)
    if start:
        clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
        expected = scheduler.add_noise(clean, noise, scheduler.timesteps[start : start + 1])
        found = sampler.add_noise(clean.numpy(), noise.numpy(), start)
    largest = float(expected.abs().max())
    assert_close(found, expected.numpy(), largest)
    for index, timestep in list(enumerate(scheduler.timesteps))[start:]:
        seen, seen_here = scheduler.scale_model_input(expected, timestep), sampler.scale_model_input(found, index)
        assert_close(seen_here, seen.numpy(), largest)
        answer, answer_here = answers[index] + 0.1 * seen, answers[index].numpy() + np.float32(0.1) * seen_here
        expected = scheduler.step(answer, timestep, expected, return_dict=False, **options)[0]
        found, memory = sampler.step(
            index, found, answer_here, memory, lambda shape: torch.randn(shape, generator=ours).numpy()
        )
        assert found.dtype == np.float32
        assert_close(found, expected.numpy(), largest)


def assert_close(found: np.ndarray, expected: np.ndarray, largest: float) -> None:
    """Within 1e-5 of the largest value, and within the last digit of the `largest` latents of the walk.

    Latents start 14 times larger than they end, where no signal is in them 4096 times.
    """
    atol = 1e-5 * max(1.0, float(np.abs(expected).max())) + largest * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
