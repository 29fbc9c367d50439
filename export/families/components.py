# SPDX-License-Identifier: Apache-2.0
"""Which graphs a loaded model becomes, and which layers in them can be compressed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...ground.names import LayerName
from ...quant.layers import compressible_layers, weight_shape
from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import ComponentSpec, TensorSpec
from .base import GraphOptions, LoadedModel
from .graphs import Component, text_encoder_component, unet_component, vae_decoder_component, vae_encoder_component
from .sizes import latent_size


def components_of(
    model: LoadedModel, sizes: Sequence[ImageSize] = (), all_states: bool = True, image_to_image: bool = False
) -> list[Component]:
    """Returns the graphs in the order in which drawing runs them; they share the model's modules.

    `sizes` are those of pictures that the graphs must take, the model's own when there are none. The rest is as in
    `GraphOptions`.
    """
    return model.family.components(model, GraphOptions(sizes or (model.image_size,), all_states, image_to_image))


def unet_components(model: LoadedModel, options: GraphOptions) -> list[Component]:
    """Returns the graphs of a model of CLIP text encoders, a UNet and a VAE."""
    latents = [latent_size(model, size) for size in options.sizes]
    free = len(latents) > 1
    traced = _traced_latents(model.modules["unet"], latents) if free else latents[0]
    encoders = {name: module for name, module in model.modules.items() if name.startswith("text_encoder")}
    tokens = model.text_tokens
    picture = ImageSize(*(side * model.vae_scale_factor for side in traced))
    return [
        *(text_encoder_component(module, name, options.all_states, tokens) for name, module in encoders.items()),
        *([vae_encoder_component(model.modules["vae"], picture, free)] if options.image_to_image else []),
        unet_component(model.modules["unet"], traced, tokens, free),
        vae_decoder_component(model.modules["vae"], traced, free),
    ]


def _traced_latents(unet: Any, latents: Sequence[ImageSize]) -> ImageSize:
    """Latents at which a graph for all these sizes is traced.

    Where a side can not be halved evenly at every level, diffusers has the way up follow the sizes of the way down;
    else it doubles. The former is right for every size, so one such size decides for all.
    """
    levels = 2**unet.num_upsamplers
    uneven = any(side % levels for size in latents for side in size)
    return ImageSize(2 * levels + uneven, 2 * levels + uneven)


def described(component: Component) -> ComponentSpec:
    """Returns what a manifest would say of a graph, as far as a pipeline asks: names, types, shapes of its inputs."""
    inputs = [
        TensorSpec(name=name, dtype="int64" if tensor.dtype == torch.int64 else "float32", shape=list(tensor.shape))
        for name, tensor in component.example_inputs.items()
    ]
    outputs = [TensorSpec(name=name, dtype="float32", shape=[]) for name in component.output_names]
    return ComponentSpec(file=component.name, inputs=inputs, outputs=outputs)


def layers_of(components: Sequence[Component]) -> dict[str, nn.Module]:
    """Returns every Linear and Conv2d of all components by its full name, such as `unet.conv_in`."""
    return {
        name: layer
        for component in components
        for name, layer in compressible_layers(component.name, component.module.model).items()
    }


def shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape of each layer."""
    return {name: weight_shape(name, layer) for name, layer in layers.items()}


def parameter_count(component: Component) -> int:
    """Returns the number of parameters of a component."""
    return sum(parameter.numel() for parameter in component.module.parameters())


def component_name(layer: str) -> str:
    """Returns the component that owns a layer."""
    return LayerName.parse(layer).component


def group_name(layer: str) -> str:
    """Returns the level of the model that a layer belongs to: `unet.down_blocks.1`, `text_encoder.layers.0`, …"""
    component, *path = layer.split(".")
    parts = [component, *(part for part in path if part not in ("decoder", "encoder", "text_model", "transformer"))]
    depth = next((index for index, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: depth + 1])
