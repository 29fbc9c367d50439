# SPDX-License-Identifier: Apache-2.0
"""What a manifest says before there are files: the pipeline's constants, from the model and the recipe."""

from collections.abc import Mapping, Sequence
from importlib import metadata

from ...runtimes.drawing.table import sampler_table
from ...runtimes.manifest import ComponentSpec, FileEntry, Manifest
from ..families.base import LoadedModel
from ..families.sizes import drawn_sizes
from ..families.student import is_student
from ..recipe import Recipe
from ..sampling.spec import image_spec, sampler_spec
from .journal import TOOLS

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
    sizes, sampler = drawn_sizes(model, recipe.image.image_sizes), sampler_spec(model, recipe.sampler)
    files = {file for spec in components.values() for file in (spec.file, spec.data) if file is not None}
    files |= {f"{package}/Manifest.json" for spec in components.values() for package in spec.packages}
    tokenizers = {name: name.replace("text_encoder", "tokenizer") for name in model.tokenizers}
    files |= {f"{folder}/tokenizer.json" for folder in tokenizers.values()}
    return Manifest(
        name=model.name,
        family=model.family.name,
        target=recipe.target.name,
        files=[FileEntry(path=path, bytes=0, sha256=_NO_HASH) for path in sorted(files)],
        components=dict(components),
        tokenizers=tokenizers,
        prompt_replacements={name: dict(each) for name, each in model.prompt_replacements.items()},
        pipeline=model.family.pipeline(model, components),
        sampler=sampler,
        sampler_table=sampler_table(sampler, recipe.sampler.image_to_image),
        only_these_steps=is_student(model.weights[model.family.denoiser]),
        image=image_spec(model, sizes[0]),
        sizes=list(sizes),
        tools={name: metadata.version(name) for name in (*TOOLS, *tools)},
        recipe=recipe.without_places(model.name).to_toml(),
        notes=[*model.notes, *notes],
    )
