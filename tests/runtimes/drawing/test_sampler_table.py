# SPDX-License-Identifier: Apache-2.0
"""A walk by the manifest's table alone is the sampler's walk: what an app needs to know of schedulers is in there."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from turbopocket.runtimes.drawing.sampler import Memory, make_sampler
from turbopocket.runtimes.drawing.table import sampler_table
from turbopocket.runtimes.pipeline import SamplerTable, Sum
from turbopocket.runtimes.schedule import SamplerSpec

from .walks import BETAS, PUBLISHED

SHAPE = (1, 4, 8, 8)
CLIPPED = {"clip_sample": True, "clip_sample_range": 0.8}
KINDS: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    "pndm to one": {**PUBLISHED["sd-1.5"], "set_alpha_to_one": True},
    "ddim clipped": {**BETAS, **CLIPPED, "_class_name": "DDIMScheduler"},
    "ddim v clipped": {**BETAS, **CLIPPED, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "ddim without signal": {
        **BETAS,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "lcm clipped": {**BETAS, **CLIPPED, "_class_name": "LCMScheduler"},
    "euler v karras": {
        **BETAS,
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
    },
    "euler without signal": {
        **BETAS,
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "dpm heun": {**PUBLISHED["dpm-karras"], "solver_type": "heun"},
    "dpm sde": {**PUBLISHED["dpm-karras"], "algorithm_type": "sde-dpmsolver++"},
    "dpm of first order": {**PUBLISHED["dpm-karras"], "solver_order": 1},
    "dpm to the smallest sigma": {**PUBLISHED["dpm-karras"], "final_sigmas_type": "sigma_min"},
}


class Walk:
    """What an app does with a table; `start` is the row at which it begins."""

    def __init__(self, table: SamplerTable, start: int) -> None:
        self.table, self.calls, self.index = table, 0, start
        self.values: dict[str, NDArray[np.float32]] = {}
        self.remembered: list[NDArray[np.float32]] = []

    def step(self, x: NDArray[np.float32], output: NDArray[np.float32], noise: Any) -> NDArray[np.float32]:
        row = self.table.rows[self.index]
        step = row.steps[min(self.calls, len(row.steps) - 1)]
        self.values |= {"x": x, "output": output}
        self.values |= {f"remembered_{age}": value for age, value in enumerate(self.remembered, 1)}
        if self.calls == 0:
            self.values["first"] = x
        if "noise" in step.next:
            self.values["noise"] = noise(x.shape)
        if row.estimate is not None:
            bound = self.table.bound
            assert bound is not None
            self.values["estimate"] = np.clip(self.added(row.estimate), -bound, bound)
        if step.remember is not None:
            self.remembered = [self.added(step.remember), *self.remembered[:2]]
        self.calls, self.index = self.calls + 1, self.index + 1
        return self.added(step.next)

    def added(self, of: Sum) -> NDArray[np.float32]:
        return sum((np.float32(number) * self.values[name] for name, number in of.items()), np.zeros(SHAPE, np.float32))


def spec_of(kind: str, steps: int) -> SamplerSpec:
    return SamplerSpec.from_scheduler_config(KINDS[kind], steps, guidance_scale=1.0)


def normal(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("steps", [6, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_by_the_table_is_the_samplers_walk(kind: str, steps: int, start: int) -> None:
    spec = spec_of(kind, steps)
    sampler, table, memory = make_sampler(spec), sampler_table(spec, first_picture=start > 0), Memory()
    assert [row.timestep for row in table.rows] == spec.timesteps
    walk, theirs, ours, answers = Walk(table, start), normal(1), normal(1), normal(2)
    if start:
        clean, noise = answers(SHAPE), answers(SHAPE)
        x_t = sampler.add_noise(clean, noise, start)
        found = np.float32(table.rows[start].signal) * clean + np.float32(table.rows[start].noise) * noise
    else:
        x_t = answers(SHAPE)
        found, x_t = x_t * np.float32(table.init_scale), x_t * np.float32(sampler.init_noise_sigma)
    largest = np.abs(x_t).max()
    for index in range(start, len(sampler.timesteps)):
        seen, seen_here = sampler.scale_model_input(x_t, index), np.float32(table.rows[index].input_scale) * found
        drift = answers(SHAPE)
        x_t, memory = sampler.step(index, x_t, drift + np.float32(0.1) * seen, memory, theirs)
        found = walk.step(found, drift + np.float32(0.1) * seen_here, ours)
        # Both round in float32, in another order: a walk from 4,096 times more noise than signal keeps fewer digits.
        atol = 1e-5 * max(1.0, float(np.abs(x_t).max())) + largest * float(np.finfo(np.float32).eps)
        np.testing.assert_allclose(found, x_t, atol=atol, rtol=0)
    assert (theirs(SHAPE) == ours(SHAPE)).all(), "as many random numbers were drawn"


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_from_the_table_is_the_samplers_step(kind: str) -> None:
    """Every call apart, so that no rounding of calls before it is carried along."""
    spec = spec_of(kind, 6)
    sampler, table, memory = make_sampler(spec), sampler_table(spec, first_picture=False), Memory()
    walk, noise, answers = Walk(table, 0), normal(1), normal(2)
    x_t = answers(SHAPE) * np.float32(sampler.init_noise_sigma)
    for index in range(len(sampler.timesteps)):
        output, drawn = answers(SHAPE), noise(SHAPE)
        expected, memory = sampler.step(index, x_t, output, memory, lambda shape, drawn=drawn: drawn)
        found = walk.step(x_t, output, lambda shape, drawn=drawn: drawn)
        scale = max(np.abs(x_t).max(), np.abs(expected).max(), 1.0)
        np.testing.assert_allclose(found, expected, atol=2e-6 * float(scale), rtol=0)
        x_t = expected


def test_a_table_of_few_steps_is_short_enough_to_read() -> None:
    table = sampler_table(spec_of("sdxl-turbo", 2), first_picture=False)
    first, last = (row.steps[0] for row in table.rows)
    assert set(first.next) == {"x", "output", "noise"}
    assert last.next == {"x": 1.0, "output": -table.rows[1].noise}  # straight to the clean latents
    assert len(table.model_dump_json(indent=2)) < 1200


def test_only_walks_that_may_begin_anywhere_need_more_than_one_sum_a_row() -> None:
    spec = spec_of("sd-1.5", 8)
    assert {len(row.steps) for row in sampler_table(spec, first_picture=False).rows} == {1}
    anywhere = sampler_table(spec, first_picture=True)
    assert [len(row.steps) for row in anywhere.rows] == [1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert {len(row.steps) for row in sampler_table(spec_of("sdxl", 8), first_picture=True).rows} == {1}
