# SPDX-License-Identifier: Apache-2.0
"""What a manifest says before there are files: the pipeline's constants, from the model and the recipe."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import ComponentSpec, FileEntry, ImageSpec, Manifest
from ...runtimes.schedule import SamplerSpec
from ...runtimes.scheduler_classes import SamplerKind, config_for
from ..checkpoint.load import LoadedModel
from ..families.sizes import drawn_sizes, latent_size
from ..families.student import is_student
from ..recipe import Recipe, SamplerSection
from .sampling_defaults import sampling_of

TOOLS = ("turbopocket", "torch", "diffusers", "transformers", "numpy")
_NO_HASH = "0" * 64


def pipeline_manifest(
    model: LoadedModel,
    recipe: Recipe,
    components: Mapping[str, ComponentSpec],
    tools: Sequence[str],
    notes: Sequence[str] = (),
) -> Manifest:
    """Returns the manifest of an artifact still to be made: every constant in place, every file of unknown content.

    Float PyTorch runs under it exactly as the artifact will, so both see the same steps and the same noise. `notes`
    are what was assumed for the recipe.
    """
    sizes = drawn_sizes(model, recipe.image.image_sizes)
    files = {file for spec in components.values() for file in (spec.file, spec.data) if file is not None}
    tokenizers = {name: name.replace("text_encoder", "tokenizer") for name in model.tokenizers}
    files |= {f"{folder}/tokenizer.json" for folder in tokenizers.values()}
    return Manifest(
        name=model.name,
        family=model.family,
        target=recipe.target.name,
        files=[FileEntry(path=path, bytes=0, sha256=_NO_HASH) for path in sorted(files)],
        components=dict(components),
        tokenizers=tokenizers,
        prompt_replacements={name: dict(each) for name, each in model.prompt_replacements.items()},
        sampler=sampler_spec(model, recipe.sampler),
        only_these_steps=is_student(model.weights["unet"]),
        image=image_spec(model, sizes[0]),
        sizes=list(sizes),
        force_zeros_for_empty_prompt=bool(model.pipeline_config.get("force_zeros_for_empty_prompt", False)),
        tools={name: metadata.version(name) for name in (*TOOLS, *tools)},
        recipe=recipe.to_toml(),
        notes=[*model.notes, *notes],
    )


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


def scheduler_config(model: LoadedModel, kind: Literal["model", SamplerKind]) -> dict[str, Any]:
    """Returns the model's scheduler config, of its own class (`model`) or of the class of a sampler's kind.

    StableDiffusionPipeline takes two settings for outdated and never draws with them: a `steps_offset` other than 1
    and `clip_sample`. Other pipelines of diffusers take the config as it is.
    """
    config = dict(model.scheduler_config) if kind == "model" else config_for(model.scheduler_config, kind)
    return config | {"steps_offset": 1, "clip_sample": False} if model.family == "sd" else config


def asks_twice(model: LoadedModel, sampler: SamplerSpec) -> bool:
    """Whether every step asks the UNet with and without the prompt, to steer away from the latter."""
    config: Any = model.modules["unet"].config
    return sampler.guidance_scale > 1 and config.time_cond_proj_dim is None


def image_spec(model: LoadedModel, size: ImageSize) -> ImageSpec:
    """Returns what a picture of that size is made from."""
    latents = latent_size(model, size)
    config: Any = model.modules["vae"].config
    # diffusers uses both or neither, and an AutoencoderTiny has none.
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return ImageSpec(
        height=size.height,
        width=size.width,
        latent_channels=config.latent_channels,
        latent_height=latents.height,
        latent_width=latents.width,
        vae_scaling_factor=config.scaling_factor,
        latents_mean=mean if std is not None else None,
        latents_std=std if mean is not None else None,
    )
