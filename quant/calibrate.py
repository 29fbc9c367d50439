# SPDX-License-Identifier: Apache-2.0
"""What each layer sees while a model runs: every registered observation of every layer, call by call."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError
from ..ground.names import LayerName, current_place
from .layers import compressible_layers
from .observe import OBSERVATIONS, Extremes, InputPower, LayerStats, Observation, QuietestOutput
from .ranges import Ranges


def calibrate(
    modules: Mapping[str, nn.Module],
    run: Callable[[], object],
    only: Collection[str] | None = None,
    kinds: Collection[type[Observation[Any]]] | None = None,
) -> dict[str, LayerStats]:
    """The statistics of every compressible layer of the components that `run()` put to use, first to run first.

    `kinds` are what is observed, all of `OBSERVATIONS` when None. A layer that did not run, or is not among `only`, is
    not in the result. Where in drawing a call is made is what `run` says by `at_place`.
    TurbopocketError naming the layer when an input or an output is NaN or infinite.
    """
    makers = {kind: kind.for_layers() for kind in (OBSERVATIONS.values() if kinds is None else kinds)}
    observed: dict[str, dict[type[Observation[Any]], Observation[Any]]] = {}
    order: dict[str, None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for component, module in modules.items():
            for name, layer in compressible_layers(component, module).items():
                if only is not None and name not in only:
                    continue
                observed[name] = {kind: make() for kind, make in makers.items()}
                for observation in observed[name].values():
                    observation.begin(layer)
                hooks.callback(layer.register_forward_hook(_hook(name, order, observed[name].values())).remove)
        run()
    return {name: LayerStats({kind: each.value() for kind, each in observed[name].items()}) for name in order}


def _hook(name: str, order: dict[str, None], observations: Collection[Observation[Any]]) -> Callable[..., None]:
    """What a layer calls after each of its own calls."""
    component = LayerName.parse(name).component

    def see(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        order.setdefault(name)
        x, y = inputs[0].detach().to(device="cpu", dtype=torch.float32), output.detach()
        for what, values in (("input", x), ("output", y)):
            if not torch.isfinite(values).all():
                raise TurbopocketError(f"{name}: an {what} is NaN or infinite while calibrating")
        place = replace(current_place(), component=component)
        for observation in observations:
            observation.see(place, x, y)

    return see


def ranges_of(stats: Mapping[str, LayerStats]) -> dict[str, Ranges]:
    """The ranges of each layer, as targets ask for them."""
    return {name: _ranges(layer) for name, layer in stats.items()}


def _ranges(stats: LayerStats) -> Ranges:
    seen, power = stats[Extremes], float(stats[InputPower].mean())
    return Ranges(seen.input, seen.output, power, stats[QuietestOutput], seen.steps)
