# SPDX-License-Identifier: Apache-2.0
"""What stored weights and rounded activations do to temporal features: how far they turn, and to which timestep.

Huang et al., TFMQ-DM (2024, arXiv 2311.16503), section 3.2: temporal feature error is cos(g_i(h(t)), ĝ_i(ĥ(t))), and
there is a mismatch where the quantized feature is nearest to the feature of another timestep.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..ground.names import CallPlace, at_place
from .temporal import TemporalBlock

DELTAS = tuple(sign * 2**power for power in range(7) for sign in (1, -1))
"""Training timesteps away from its own at which a quantized feature is looked for: 1 to 64, both ways."""


@dataclass(frozen=True)
class TemporalCall:
    """A call of a denoiser as far as temporal features depend on it: where it was made, and those inputs [B, …]."""

    place: CallPlace
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class FeatureError:
    """Of one feature g_i at one step, the worst of all calls.

    Attributes:
        layer: that gives the feature.
        step: of the walk, from 0; timestep: the denoiser's there.
        cosine: of the angle between the float feature and the quantized one.
        relative_error: ||g_i(h(t)) - ĝ_i(ĥ(t))|| / ||g_i(h(t))||.
        shift: argmin over δ of ||g_i(h(t + δ)) - ĝ_i(ĥ(t))||, δ = 0 or one of `DELTAS`; 0 where there is no mismatch.
    """

    layer: str
    step: int
    timestep: float
    cosine: float
    relative_error: float
    shift: int


def feature_errors(
    block: TemporalBlock,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: Sequence[TemporalCall],
    timestep: str,
    quantized: Callable[[], AbstractContextManager[object]],
) -> list[FeatureError]:
    """The error of each feature at each step, in that order of steps.

    `layers` hold float weights; while `quantized()` is entered they compute as they are shipped. `timestep` is the
    input's name.
    """
    worst: dict[tuple[int, str], FeatureError] = {}

    def features(call: TemporalCall, delta: int = 0) -> dict[str, Tensor]:
        moved = {timestep: (call.inputs[timestep] + delta).clamp(min=0)} if delta else {}
        with at_place(**asdict(call.place)):
            return block.features(module, layers, {**call.inputs, **moved})

    with torch.inference_mode():
        with quantized():
            found = [features(call) for call in calls]
        for call, own in zip(calls, found, strict=True):
            there = features(call)
            moved = {delta: features(call, delta) for delta in DELTAS}
            for name in block.ends:
                elsewhere = {delta: each[name] for delta, each in moved.items()}
                error = _error(call, timestep, name, there[name], elsewhere, own[name])
                known = worst.setdefault((error.step, name), error)
                worst[error.step, name] = _worse(known, error)
    return [worst[key] for key in sorted(worst, key=lambda key: key[0])]


def _error(
    call: TemporalCall, timestep: str, layer: str, expected: Tensor, elsewhere: Mapping[int, Tensor], found: Tensor
) -> FeatureError:
    distances = {0: _distance(expected, found)} | {
        delta: _distance(moved, found) for delta, moved in elsewhere.items() if not torch.equal(moved, expected)
    }
    sizes = float(expected.double().norm()), float(found.double().norm())
    product = float((expected.double() * found.double()).sum())
    return FeatureError(
        layer=layer,
        step=call.place.step or 0,
        timestep=float(call.inputs[timestep].flatten()[0]),
        cosine=min(1.0, product / (sizes[0] * sizes[1])) if all(sizes) else float(sizes[0] == sizes[1]),
        relative_error=distances[0] / sizes[0] if sizes[0] else distances[0],
        shift=min(distances, key=lambda delta: (distances[delta], abs(delta))),
    )


def _worse(one: FeatureError, other: FeatureError) -> FeatureError:
    return FeatureError(
        one.layer,
        one.step,
        one.timestep,
        min(one.cosine, other.cosine),
        max(one.relative_error, other.relative_error),
        max(one.shift, other.shift, key=abs),
    )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm())
