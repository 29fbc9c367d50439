# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint: which family it is of, its modules, and all that its pipeline says about drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...runtimes.errors import TurbopocketError
from .base import LoadedModel, ModelFamily, ModuleSpec
from .json_object import read_json_object
from .lora import merge_lora
from .pipeline_index import family_of, pipeline_config, read_pipeline_index
from .sd import SD
from .sdxl import SDXL
from .source import resolve
from .steps import tell_steps
from .tokenizer import tokenizer_json
from .weights import checked_tensors, empty_module, fill_weights

__all__ = [
    "FAMILIES",
    "LoadedModel",
    "ModelFamily",
    "ModuleSpec",
    "load",
    "load_shapes",
    "tokenizer_json",
]

FAMILIES: tuple[ModelFamily, ...] = (SDXL, SD)
ALL_FOLDERS = frozenset(folder for family in FAMILIES for folder in family.folders)


def load(source: str, lora: Sequence[Path] = (), steps: int | None = None) -> LoadedModel:
    """Returns the model at `source` with its weights, LoRA files merged into them in order.

    `source` is a bundled name (`pocket`), a diffusers folder, or a hub id. `steps` sets a student that was
    distilled for several step counts for one of them; by default it is as saved. Raises TurbopocketError when
    `source` is none of those, or the checkpoint is not whole, not supported, or not finite.
    """
    name, folder = resolve(source, ALL_FOLDERS, with_weights=True)
    model, family = _described(name, folder, has_weights=True)
    stored = {  # every header before any values, so that a broken UNet is known before gigabytes are read
        component: checked_tensors(model.modules[component], folder / component, spec)
        for component, spec in family.modules.items()
    }
    for component, tensors in stored.items():
        fill_weights(model.modules[component], tensors)
    if steps is not None:
        tell_steps(model.modules["unet"], folder / "unet", steps)
    for file in lora:
        merge_lora(model, family, file)
    return model


def load_shapes(source: str) -> LoadedModel:
    """Returns the model at `source` without weights, all tensors on the meta device; reads only the configs.

    Raises TurbopocketError as `load` does, except about weights.
    """
    name, folder = resolve(source, ALL_FOLDERS, with_weights=False)
    model, _ = _described(name, folder, has_weights=False)
    for module in model.modules.values():
        module.to("meta")
    return model


def _described(name: str, folder: Path, has_weights: bool) -> tuple[LoadedModel, ModelFamily]:
    index = read_pipeline_index(folder)
    family = family_of(index, folder, FAMILIES)
    modules = {component: empty_module(folder / component, spec) for component, spec in family.modules.items()}
    _check_widths(modules, folder)
    vae: Any = modules["vae"]
    vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    model = LoadedModel(
        name=name,
        family=family.name,
        folder=folder,
        modules=modules,
        tokenizers={f"text_encoder{t.removeprefix('tokenizer')}": folder / t for t in family.tokenizers},
        scheduler_config=read_json_object(folder / "scheduler" / "scheduler_config.json"),
        pipeline_config=pipeline_config(index, family),
        image_size_px=_sample_size(modules["unet"], folder) * vae_scale_factor,
        vae_scale_factor=vae_scale_factor,
        has_weights=has_weights,
    )
    return model, family


def _check_widths(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Raises TurbopocketError when modules that were made for different pipelines lie in one folder."""
    configs: dict[str, Any] = {name: module.config for name, module in modules.items()}
    unet, latent_channels = configs["unet"], configs["vae"]["latent_channels"]
    encoders = [name for name in modules if name.startswith("text_encoder")]
    text_width = sum(configs[name].hidden_size for name in encoders)
    if unet["cross_attention_dim"] != text_width:
        raise TurbopocketError(
            f"{folder}: the UNet takes text {unet['cross_attention_dim']} wide, "
            f"{' and '.join(encoders)} give {text_width}"
        )
    if unet["in_channels"] != latent_channels:
        raise TurbopocketError(
            f"{folder}: the UNet takes {unet['in_channels']} channels, the VAE's latents have "
            f"{latent_channels}; inpainting and editing models are not supported"
        )


def _sample_size(unet: Any, folder: Path) -> int:
    size = unet.config["sample_size"]
    if not isinstance(size, int):
        raise TurbopocketError(f"{folder / 'unet' / 'config.json'}: sample_size is {size!r}; one integer is needed")
    return size
