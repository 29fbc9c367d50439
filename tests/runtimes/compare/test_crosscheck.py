# SPDX-License-Identifier: Apache-2.0
"""A slow runtime's calls given to a quick one: what may differ by how much, and what is named when it does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbopocket.ground.arrays import Arrays
from turbopocket.runtimes.compare.crosscheck import crosscheck
from turbopocket.runtimes.compare.replay import Call
from turbopocket.runtimes.compare.rows import Limits, ParityReport

LIMITS = Limits(max_relative_error=0.05)
X = np.ones((1, 4), dtype=np.float32)


class Scaled:
    """Each component multiplies by its factor, in its only layer `times`."""

    def __init__(self, **factors: float) -> None:
        self.factors = factors

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return {"y": inputs["x"] * np.float32(self.factors[component])}

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        return {layer: self.run(component, inputs)["y"] for layer in layers}

    def layers(self, component: str) -> list[str]:
        return ["times"]

    def run_following(
        self, component: str, inputs: Mapping[str, NDArray[Any]], followed: Mapping[str, NDArray[Any]]
    ) -> tuple[Arrays, Arrays]:
        return {"y": followed["times"]}, self.run_layers(component, inputs, ["times"])


def checked(slow: Scaled, ceilings: Mapping[str, float], limits: Limits = LIMITS) -> ParityReport:
    calls = [Call(component, {"x": X}, slow.run(component, {"x": X})) for component in ("unet", "vae")]
    right = Scaled(unet=1.0, vae=1.0)
    return crosscheck(slow, calls, right, right, limits, ceilings)


def test_a_component_must_stay_under_its_ceiling_too() -> None:
    slow = Scaled(unet=1.02, vae=1.02)
    assert checked(slow, {}).passed
    assert checked(slow, {"unet": 0.04, "vae": 0.04}).passed
    report = checked(slow, {"unet": 0.04, "vae": 0.01})
    assert [(row.component, row.passed) for row in report.rows] == [("unet", True), ("vae", False)]
    assert report.first_divergence is not None
    assert (report.first_divergence.component, report.first_divergence.layer) == ("vae", "times")


def test_a_ceiling_allows_no_more_than_the_limit() -> None:
    report = checked(Scaled(unet=1.06, vae=1.0), {"unet": 1.0})
    assert [row.max_relative_error for row in report.rows] == [0.05, 0.05]
    assert not report.passed


def test_the_failure_told_is_that_of_the_component_which_is_over_its_own_ceiling() -> None:
    report = checked(Scaled(unet=1.03, vae=1.02), {"vae": 0.01})
    assert report.failure is not None
    assert report.failure.startswith("vae: relative error 0.02 is over 0.01")


def test_by_layer_has_ceilings_as_well() -> None:
    by_layer = Limits(max_relative_error=0.05, by_layer=True)
    assert checked(Scaled(unet=1.02, vae=1.0), {}, by_layer).passed
    report = checked(Scaled(unet=1.02, vae=1.0), {"unet": 0.01}, by_layer)
    assert [row.passed for row in report.rows] == [False, True]
    assert report.first_divergence is not None
