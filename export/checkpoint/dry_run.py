# SPDX-License-Identifier: Apache-2.0
"""Running every graph of a model on shapes alone: what cannot run is refused before any weight is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from ..families.base import LoadedModel
from ..families.components import components_of
from ..families.graphs import Component

OWNERS = {"vae_decoder": "vae"}
"""Folders whose name is not the component's."""


def run_on_shapes(model: LoadedModel, config_folder: Callable[[str], Path]) -> None:
    """Returns when every graph runs with what drawing gives it, and gives what drawing needs.

    The model's parameters are on the meta device; `config_folder` says where a module's config lies. Raises
    TurbopocketError naming the config of the first that does not.
    """
    for component in components_of(model):
        path = config_folder(OWNERS.get(component.name, component.name)) / "config.json"
        with one_sentence(f"{path}: such a model does not run on a prompt alone"):
            outputs = _shapes(component)
        for name, wanted in _wanted(model, component).items():
            if outputs[name] != wanted:
                found = list(outputs[name][1:])
                raise TurbopocketError(
                    f"{path}: {component.name} gives {name} of {found}, {list(wanted[1:])} is needed"
                )


@torch.no_grad()
def _shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs for the component's example inputs."""
    inputs = tuple(example.to("meta") for example in component.example_inputs.values())
    buffers = {name: buffer.to("meta") for name, buffer in component.module.named_buffers()}
    outputs: Any = functional_call(component.module, buffers, inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return {name: tuple(output.shape) for name, output in zip(component.output_names, outputs, strict=True)}


def _wanted(model: LoadedModel, component: Component) -> dict[str, tuple[int, ...]]:
    """Shapes that the loop relies on."""
    latents, *_ = component.example_inputs.values()
    config = model.denoiser.config
    predicted = (len(latents), config.out_channels or config.in_channels, *latents.shape[2:])
    picture = (len(latents), 3, *model.image_size)
    wanted = {"denoiser": predicted, "decoder": picture}.get(component.role)
    return {} if wanted is None else dict.fromkeys(component.output_names, wanted)
