# SPDX-License-Identifier: Apache-2.0
"""What a model is drawn with, as the manifest has it: sampler and picture."""

from typing import Any

from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import ImageSpec
from ...runtimes.schedule import SamplerSpec
from ...runtimes.scheduler_classes import config_for
from ..families.base import LoadedModel
from ..families.sizes import latent_channels, latent_size
from ..recipe import MODEL_SAMPLER, Recipe, SamplerSection
from .defaults import sampling_of


def with_sampling(recipe: Recipe, model: LoadedModel) -> tuple[Recipe, tuple[str, ...]]:
    """Returns the recipe with its sampler's steps and guidance in it, and a sentence on each that was assumed.

    Reads no weights. Raises TurbopocketError when they are told neither by the recipe nor by the model, and when the
    model's scheduler has no sampler here.
    """
    asked = recipe.sampler
    lora = [each.file for each in recipe.model.lora if each.strength > 0]
    found = sampling_of(model, asked.steps, asked.guidance, lora)
    sampler = asked.model_copy(update={"steps": found.steps, "guidance": found.guidance})
    return (
        recipe.model_copy(update={"sampler": sampler}),
        (*found.notes, *found.sampler_notes(sampler_spec(model, sampler))),
    )


def sampler_spec(model: LoadedModel, section: SamplerSection) -> SamplerSpec:
    """Returns the sampler that the artifact ships: the recipe's wishes over the model's own settings; raises as
    `sampling_of` does."""
    found = sampling_of(model, section.steps, section.guidance)
    return SamplerSpec.from_scheduler_config(scheduler_config(model, section.kind), found.steps, found.guidance)


def scheduler_config(model: LoadedModel, kind: str) -> dict[str, Any]:
    """Returns the model's scheduler config, of its own class (`model`) or of the class of a sampler's kind, with what
    its pipeline never takes from a config."""
    config = dict(model.scheduler_config) if kind == MODEL_SAMPLER else config_for(model.scheduler_config, kind)
    return config | dict(model.family.scheduler_settings)


def image_spec(model: LoadedModel, size: ImageSize) -> ImageSpec:
    """Returns what a picture of that size is made from."""
    latents = latent_size(model, size)
    config: Any = model.modules["vae"].config
    # diffusers uses both or neither, and an AutoencoderTiny has none.
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return ImageSpec(
        height=size.height,
        width=size.width,
        latent_channels=latent_channels(config),
        latent_height=latents.height,
        latent_width=latents.width,
        vae_scaling_factor=config.get("scaling_factor", 1.0),
        latents_mean=mean if std is not None else None,
        latents_std=std if mean is not None else None,
    )
