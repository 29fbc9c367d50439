# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint: which family it is of, its modules, and all that its pipeline says about drawing."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...ground.errors import TurbopocketError
from ...runtimes.image_size import MOST_PIXELS_ASIDE, ImageSize
from ...runtimes.scheduler_classes import has_no_betas
from ..families.base import LoadedModel, ModelFamily, ModuleSpec
from ..families.keys import shown
from ..families.registry import FAMILIES, all_folders
from ..families.sizes import pixels_aside
from ..families.student import tell_steps
from .dry_run import run_on_shapes
from .header import StoredTensor
from .index import family_of, modules_of, pipeline_config, read_pipeline_index, scheduler_class
from .json_object import read_json_object
from .lora.file import LoraFile
from .lora.merge import merge_lora, require_adaptable
from .source import Checkpoint, resolve
from .tokenizer import prompt_rules, tokenizer_json
from .weights import check_known_tensors, checked_tensors, empty_module, fill_weights

__all__ = [
    "LoadedModel",
    "ModelFamily",
    "ModuleSpec",
    "load",
    "load_shapes",
    "require_built",
    "tokenizer_json",
]


def load(
    source: str, lora: Sequence[LoraFile] = (), steps: int | None = None, config: str | None = None
) -> LoadedModel:
    """Returns the model at `source` with its weights, to which the LoRA files are added in order.

    `source` is a bundled name (`pocket`), a diffusers folder, a single file, a UNet's own folder, or a hub id;
    `config` completes a file or a UNet (see `source.resolve`). `steps` sets a student that was distilled for several
    step counts for one of them; by default it is as saved. Raises TurbopocketError when `source` is none of those,
    or the checkpoint is not whole, not supported, or not finite.
    """
    checkpoint = resolve(source, config, all_folders(), with_weights=True)
    model, specs = _described(checkpoint, has_weights=True)
    if lora:
        require_adaptable(model)
    stored = {  # every header before any values, so that a broken denoiser is known before gigabytes are read
        component: _stored(checkpoint, component, spec, model.modules[component]) for component, spec in specs.items()
    }
    for component, tensors in stored.items():
        fill_weights(model.modules[component], tensors)
    if steps is not None:
        tell_steps(model.denoiser, model.weights[model.family.denoiser], steps)
    for asked in lora:
        merge_lora(model, asked)
    return model


def load_shapes(source: str, config: str | None = None) -> LoadedModel:
    """Returns the model at `source` without weights, all tensors on the meta device.

    Reads only the small files, and the header of a single file. Raises TurbopocketError as `load` does, except about
    weights, and about tokenizers and schedulers that are absent.
    """
    checkpoint = resolve(source, config, all_folders(), with_weights=False)
    model, specs = _described(checkpoint, has_weights=False)
    for component in checkpoint.file.parts if checkpoint.file else ():
        _stored(checkpoint, component, specs[component], model.modules[component])
    for component, spec in specs.items() if model.family.only_planned else ():  # nothing else ever reads its weights
        check_known_tensors(model.modules[component], checkpoint.config_folder(component), spec)
    for module in model.modules.values():
        module.to("meta")
    return model


def require_built(model: LoadedModel) -> None:
    """Raises TurbopocketError for a model of which nothing but a plan is made."""
    _require_built(model.family, model.folder)


def _require_built(family: ModelFamily, folder: Path) -> None:
    if family.only_planned is not None:
        raise TurbopocketError(
            f"{folder}: of {family.pipeline_class} folders a plan is made and nothing else yet: {family.only_planned}",
            hint=f"turbopocket plan {folder}",
        )


def _stored(checkpoint: Checkpoint, component: str, spec: ModuleSpec, module: nn.Module) -> dict[str, StoredTensor]:
    found = checkpoint.stored_tensors(component, module, spec)
    hint = checkpoint.completion.hint if checkpoint.completion else None
    return checked_tensors(module, found, checkpoint.weights(component), spec, hint)


def _described(checkpoint: Checkpoint, has_weights: bool) -> tuple[LoadedModel, Mapping[str, ModuleSpec]]:
    folder = checkpoint.folder
    index = read_pipeline_index(folder)
    family = family_of(index, folder, list(FAMILIES.values()), configs_only=not has_weights)
    if has_weights:
        _require_built(family, folder)
    specs = modules_of(index, folder, family)
    modules = {name: empty_module(checkpoint.config_folder(name), spec) for name, spec in specs.items()}
    configs: dict[str, Any] = {name: module.config for name, module in modules.items()}
    family.check(modules, folder)
    vae_scale_factor = pixels_aside(configs["vae"])
    tokenizers = {f"text_encoder{t.removeprefix('tokenizer')}": folder / t for t in family.tokenizers}
    rules = prompt_rules(tokenizers, configs, family.tokenizer, has_weights, family.prompt_tokens)
    latents = _sample_size(configs[family.denoiser], checkpoint.config_folder(family.denoiser), family)
    if max(latents) * vae_scale_factor > MOST_PIXELS_ASIDE:
        raise TurbopocketError(
            f"{folder}: a picture of {latents} latents, {vae_scale_factor} pixels each, has more than "
            f"{MOST_PIXELS_ASIDE:,} pixels on a side"
        )
    model = LoadedModel(
        name=checkpoint.name,
        family=family,
        folder=folder,
        modules=modules,
        tokenizers=tokenizers,
        text_tokens=rules.tokens,
        prompt_replacements=rules.replacements,
        scheduler_config=_scheduler_config(checkpoint, index, has_weights, family.schedulers),
        pipeline_config=pipeline_config(index, family),
        image_size=ImageSize(*(side * vae_scale_factor for side in latents)),
        vae_scale_factor=vae_scale_factor,
        has_weights=has_weights,
        weights={name: checkpoint.weights(name) for name in family.modules},
        notes=(*checkpoint.notes, *family.notes),
    )
    run_on_shapes(model, checkpoint.config_folder)
    return model, specs


def _scheduler_config(
    checkpoint: Checkpoint, index: dict[str, Any], required: bool, schedulers: Sequence[str]
) -> dict[str, Any]:
    """The scheduler's config, of the class that the pipeline makes of it; that alone where it is absent and may be.
    It is one of `schedulers`, where there are any.

    A class of its own that has no betas stays: the pipeline's would draw from betas that nobody stated.
    """
    if required:
        read_json_object(checkpoint.scheduler_file)
    config, drawn_by = checkpoint.scheduler_config, scheduler_class(index, checkpoint.folder)
    if schedulers and drawn_by not in schedulers:
        raise TurbopocketError(
            f"{checkpoint.folder / 'model_index.json'}: scheduler class {shown(drawn_by)} does not go with such a "
            f"model; supported: {' or '.join(schedulers)}"
        )
    return {"_class_name": drawn_by} | config if has_no_betas(config) else config | {"_class_name": drawn_by}


def _sample_size(denoiser: Any, folder: Path, family: ModelFamily) -> ImageSize:
    """The latents' size that the denoiser was trained for.

    Stable Diffusion saved by diffusers before 0.9.0 may say 32, and its pipeline takes 64.
    """
    size, saved_by = denoiser.get("sample_size", family.sample_size), str(denoiser.get("_diffusers_version", ""))
    if isinstance(size, int) and re.match(r"0\.[0-8]\.", saved_by):
        size = max(size, family.old_least_sample_size)
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or any(type(s) is not int or s < 1 for s in sides):
        raise TurbopocketError(
            f"{folder / 'config.json'}: sample_size is {size!r}; a positive integer, or [height, width] of them, is "
            "needed"
        )
    return ImageSize(*sides)
