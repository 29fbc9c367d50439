# SPDX-License-Identifier: Apache-2.0
"""A sampler's walk as a table of numbers, read off the steps that draw: a step is a sum, and a bound in some.

Each step is run once on unit vectors, one for each thing that it may add up; what comes out are the coefficients.
"""

from typing import Any, get_args

import numpy as np

from ..pipeline import Operand, SamplerRow, SamplerStep, SamplerTable, Sum
from ..schedule import SamplerSpec
from .sampler import Memory, Sampler, make_sampler

_OPERANDS: tuple[Operand, ...] = get_args(Operand)
_LONGEST_MEMORY = 4
"""Calls after which no sampler's step depends on how many there were: PNDM weighs four predictions."""

_Vector = Any
"""Coefficients of the operands [8]: float64, so that only the sampler's own float32 constants are rounded."""


def sampler_table(spec: SamplerSpec, first_picture: bool) -> SamplerTable:
    """The table of `spec` at its number of steps.

    With `first_picture` walks may begin at every row, which a sampler with a memory needs more numbers for. Raises
    TurbopocketError when its schedule does not have as many steps.
    """
    sampler = make_sampler(spec)
    rows = [_row(sampler, index, first_picture) for index in range(len(sampler.timesteps))]
    bounded = any(row.estimate is not None for row in rows)
    return SamplerTable(
        init_scale=_shortest(sampler.init_noise_sigma), bound=spec.clip_sample_range if bounded else None, rows=rows
    )


def _row(sampler: Sampler, index: int, first_picture: bool) -> SamplerRow:
    longest = min(index, _LONGEST_MEMORY)
    found = [_step(sampler, index, calls) for calls in range(0 if first_picture else longest, longest + 1)]
    steps, estimates = [step for step, _ in found], [estimate for _, estimate in found]
    while len(steps) > 1 and steps[-1] == steps[-2]:
        steps.pop()
    one: Any = np.ones(1)
    zero: Any = np.zeros(1)
    return SamplerRow(
        timestep=float(sampler.timesteps[index]),
        signal=_shortest(_scalar(sampler.add_noise(one, zero, index))),
        noise=_shortest(_scalar(sampler.add_noise(zero, one, index))),
        input_scale=_shortest(_scalar(sampler.scale_model_input(one, index))),
        estimate=estimates[0],
        steps=steps,
    )


def _step(sampler: Sampler, index: int, calls: int) -> tuple[SamplerStep, Sum | None]:
    """The step of a walk that made so many calls before this one, and what it bounds, if anything."""
    memory, zero = Memory(), np.zeros(1, np.float32)
    for before in range(index - calls, index):
        _, memory = sampler.step(before, zero, zero, memory, lambda shape: zero)
    remembered = tuple(_unit(f"remembered_{age}") for age in range(len(memory.outputs), 0, -1))
    memory = Memory(remembered, None if memory.x_first is None else _unit("first"))
    estimates: list[_Vector] = []

    def bound(x_0: _Vector) -> _Vector:
        estimates.append(x_0)
        return _unit("estimate")

    own = sampler.bound
    if sampler.spec.clip_sample_range is not None:
        sampler.bound = bound
    try:
        x_next, after = sampler.step(index, _unit("x"), _unit("output"), memory, lambda shape: _unit("noise"))
    finally:
        sampler.bound = own
    new = [value for value in after.outputs if not any(value is old for old in remembered)]
    step = SamplerStep(next=_sum(x_next), remember=_sum(new[-1]) if new else None)
    return step, _sum(estimates[0]) if "estimate" in step.next else None


def _unit(operand: str) -> _Vector:
    """The vector of one operand; one that is remembered longer than steps look back is none."""
    return np.array([operand == each for each in _OPERANDS], dtype=np.float64)


def _sum(vector: _Vector) -> Sum:
    return {name: _shortest(value) for name, value in zip(_OPERANDS, vector.tolist(), strict=True) if value}


def _scalar(value: _Vector) -> float:
    return float(value[0])


def _shortest(value: float) -> float:
    """The number of fewest digits that is the same in float32."""
    return float(str(np.float32(value)))
