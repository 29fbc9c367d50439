# SPDX-License-Identifier: Apache-2.0
"""How drawing puts a model's graphs together, as data: what families have in common, and Stable Diffusion's own."""

from collections.abc import Mapping

from ...runtimes.manifest import ComponentSpec
from ...runtimes.pipeline import (
    Decoder,
    Denoiser,
    Encoder,
    Feed,
    GuidanceFeed,
    NumbersFeed,
    Output,
    Pipeline,
    TextEncoder,
    TextFeed,
)
from .base import LoadedModel
from .graphs import LATENT_SAMPLE, PENULTIMATE, TIMESTEP_COND

DECODER = Decoder(component="vae_decoder", latents="latent_sample", output="sample")


def encoder_of(components: Mapping[str, ComponentSpec]) -> Encoder | None:
    """Returns how a first picture is read, where there is a graph for it."""
    if "vae_encoder" not in components:
        return None
    [output] = _output_names(components["vae_encoder"])
    return Encoder(
        component="vae_encoder",
        picture="sample",
        output=output,
        gives="latents" if output == LATENT_SAMPLE else "means and log variances",
    )


def text_of(*outputs: tuple[str, str]) -> TextFeed:
    """Returns what stands for these outputs of text encoders, (component, output), side by side."""
    return TextFeed(join=[Output(component=component, output=output) for component, output in outputs])


def stable_diffusion(model: LoadedModel, components: Mapping[str, ComponentSpec]) -> Pipeline:
    """One text encoder's last state; what stands for no prompt is the empty one."""
    feeds: dict[str, Feed] = {"encoder_hidden_states": text_of(("text_encoder", "last_hidden_state"))}
    return _unet_pipeline(components, ["text_encoder"], feeds, zeros=False)


def stable_diffusion_xl(model: LoadedModel, components: Mapping[str, ComponentSpec]) -> Pipeline:
    """Both text encoders' states before the last layer, the second's pooled one, and six sizes: original, crop, target
    (Podell et al. 2023, arXiv 2307.01952), here those of an uncropped picture of the size that is drawn."""
    encoders = ["text_encoder", "text_encoder_2"]
    feeds: dict[str, Feed] = {
        "encoder_hidden_states": text_of(*((name, _penultimate(components[name])) for name in encoders)),
        "text_embeds": text_of(("text_encoder_2", "text_embeds")),
        "time_ids": NumbersFeed(values=["height", "width", 0.0, 0.0, "height", "width"]),
    }
    zeros = model.pipeline_config["force_zeros_for_empty_prompt"]
    return _unet_pipeline(components, encoders, feeds, zeros)


def _unet_pipeline(
    components: Mapping[str, ComponentSpec], encoders: list[str], feeds: dict[str, Feed], zeros: bool
) -> Pipeline:
    for spec in components["unet"].loop_inputs:
        if spec.name == TIMESTEP_COND:
            feeds[spec.name] = GuidanceFeed(width=int(spec.shape[-1]))
    return Pipeline(
        text_encoders={name: TextEncoder() for name in encoders},
        denoiser=Denoiser(component="unet", latents="sample", timestep="timestep", inputs=feeds, output="out_sample"),
        without_prompt="zeros" if zeros else "empty prompt",
        decoder=DECODER,
        encoder=encoder_of(components),
    )


def _penultimate(spec: ComponentSpec) -> str:
    """The state before the last layer; states count from the embedding up where a graph gives all of them."""
    names = _output_names(spec)
    count = sum(name.startswith("hidden_states.") for name in names)
    return PENULTIMATE if PENULTIMATE in names else f"hidden_states.{count - 2}"


def _output_names(spec: ComponentSpec) -> list[str]:
    return [each.name for each in spec.loop_outputs]
