# SPDX-License-Identifier: Apache-2.0
"""Pipelines of the tests' own manifests."""

from typing import Literal

from turbopocket.runtimes.pipeline import Decoder, Denoiser, NumbersFeed, Output, Pipeline, TextEncoder, TextFeed

DECODER = Decoder(component="vae_decoder", latents="latent_sample", output="sample")


def text(*outputs: tuple[str, str]) -> TextFeed:
    return TextFeed(join=[Output(component=component, output=output) for component, output in outputs])


def unet(**feeds: TextFeed | NumbersFeed) -> Denoiser:
    return Denoiser(component="unet", latents="sample", timestep="timestep", inputs=feeds, output="out_sample")


def sd() -> Pipeline:
    states = text(("text_encoder", "last_hidden_state"))
    encoders = {"text_encoder": TextEncoder()}
    denoiser = unet(encoder_hidden_states=states)
    return Pipeline(text_encoders=encoders, denoiser=denoiser, without_prompt="empty prompt", decoder=DECODER)


def sdxl(without_prompt: Literal["zeros", "empty prompt"]) -> Pipeline:
    """Of text encoders of two layers: the state before the last one is that after the first."""
    encoders = ("text_encoder", "text_encoder_2")
    denoiser = unet(
        encoder_hidden_states=text(*((name, "hidden_states.1") for name in encoders)),
        text_embeds=text(("text_encoder_2", "text_embeds")),
        time_ids=NumbersFeed(values=["height", "width", 0, 0, "height", "width"]),
    )
    read = {name: TextEncoder() for name in encoders}
    return Pipeline(text_encoders=read, denoiser=denoiser, without_prompt=without_prompt, decoder=DECODER)


def of_one_graph(component: str, given: str, output: str) -> Pipeline:
    """For manifests that are not drawn with."""
    denoiser = Denoiser(component=component, latents=given, timestep=given, inputs={}, output=output)
    decoder = Decoder(component=component, latents=given, output=output)
    return Pipeline(text_encoders={}, denoiser=denoiser, without_prompt="empty prompt", decoder=decoder)
