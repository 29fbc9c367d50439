# SPDX-License-Identifier: Apache-2.0
"""FLUX.2's transformer and the decoder of its VAE as graphs whose latents are patches, [B, 4C, h, w].

diffusers' pipeline draws in patches of 2 x 2 latents of the VAE, as rows of a sequence. A graph has them where they lie
in the picture, and its positions follow from the sides.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...runtimes.image_size import ImageSize
from .graphs import EXAMPLE_BATCH, TIMESTEP, Component, ComponentModule

TRAINED_STEPS = 1000
"""The pipeline tells a timestep as its share of these."""


class _Transformer(ComponentModule):
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        batch, _, height, width = hidden_states.shape
        torch._check(encoder_hidden_states.shape[0] == batch)  # one batch size, so that tracing finds one symbol
        sides = [torch.arange(side, device=timestep.device) for side in (1, height, width)]
        first, down, across = sides
        along = torch.arange(encoder_hidden_states.shape[1], device=timestep.device)
        predicted = self.model(
            hidden_states=hidden_states.flatten(2).transpose(1, 2),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep.expand(batch) / TRAINED_STEPS,
            img_ids=torch.cartesian_prod(first, down, across, first),
            txt_ids=torch.cartesian_prod(first, first, first, along),
            return_dict=False,
        )[0]
        found: Tensor = predicted.transpose(1, 2).unflatten(2, (height, width))
        return found


def flux2_transformer_component(transformer: Any, latent_size: ImageSize, text_tokens: int) -> Component:
    """`hidden_states` [B, C, h, w], `timestep` [] or [B] and `encoder_hidden_states` [B, T, D], all float32, to
    `out_sample` [B, C, h, w], the velocity of flow matching (Lipman et al. 2022, arXiv 2210.02747)."""
    config = transformer.config
    inputs = {
        "hidden_states": torch.zeros(EXAMPLE_BATCH, config.in_channels, *latent_size),
        TIMESTEP: torch.tensor(999.0),
        "encoder_hidden_states": torch.zeros(EXAMPLE_BATCH, text_tokens, config.joint_attention_dim),
    }
    return Component("transformer", _Transformer("transformer", transformer), inputs, ("out_sample",), role="denoiser")


class _PatchDecoder(nn.Module):
    """The half of an AutoencoderKLFlux2 that draws, with the module paths it has in the whole, from patches as the
    transformer knows them. Their mean and deviation are parameters, so that every target stores them as it does norms.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        device = vae.decoder.conv_in.weight.device
        deviation = torch.sqrt(vae.bn.running_var + vae.bn.eps)
        self.mean = nn.Parameter(vae.bn.running_mean.to(device)[:, None, None], requires_grad=False)
        self.deviation = nn.Parameter(deviation.to(device)[:, None, None], requires_grad=False)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.patch = tuple(vae.config.patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        down, across = self.patch
        latent = (latent * self.deviation + self.mean).unflatten(1, (-1, down, across))
        latent = latent.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        picture: Tensor = self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))
        return picture


class _Decoder(ComponentModule):
    def forward(self, latent_sample: Tensor) -> Tensor:
        picture: Tensor = self.model(latent_sample)
        return picture


def flux2_decoder_component(vae: Any, latent_size: ImageSize) -> Component:
    """`latent_sample` [B, 4C, h, w], patches, to `sample` [B, 3, H, W] in -1..1."""
    channels = vae.bn.num_features
    return Component(
        name="vae_decoder",
        module=_Decoder("vae_decoder", _PatchDecoder(vae)),
        example_inputs={"latent_sample": torch.zeros(EXAMPLE_BATCH, channels, *latent_size)},
        output_names=("sample",),
        role="decoder",
    )
