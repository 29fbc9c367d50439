# SPDX-License-Identifier: Apache-2.0
"""Merging LoRA files into a model's weights: W + strength · alpha / rank · B A (Hu et al. 2021, eq. 3).

The arithmetic is ours, layer by layer: diffusers 0.42 and peft 0.21 mistake the ranks and alphas of single layers for
those of others where a file has several.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ....ground.errors import TurbopocketError
from ....ground.reading import one_sentence
from ...families.base import LoadedModel
from ..header import StoredTensor
from ..weights import read_tensors
from .alpha import StatedAlphas, stated_alphas
from .change import WHOLE, FactoredChange, WrongShapeError
from .file import LoraFile
from .header import ALLOWED, read_lora
from .names import PREFIXES, LayerNames, split_name


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of the model, and what a file holds for it: tensors by the part of the change that they are."""

    component: str
    path: str
    spelled: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def require_adaptable(model: LoadedModel) -> None:
    """Raises TurbopocketError when LoRA files have no names for the model's layers."""
    denoiser = model.family.denoiser
    if denoiser not in PREFIXES:
        raise TurbopocketError(
            f"a LoRA was given for {model.name}, which has a {denoiser}; {ALLOWED}",
            hint="merge it with diffusers' fuse_lora, and give the folder that save_pretrained writes",
        )


def merge_lora(model: LoadedModel, asked: LoraFile) -> None:
    """Afterwards the model's weights hold the LoRA, each layer with its own rank and alpha (without one: its rank).

    A layer without a bias gets one when the file has one for it. Raises TurbopocketError when the file is not a
    safetensors LoRA, or holds anything that can not be merged whole; the model is then no longer of use.
    """
    stored, metadata = read_lora(asked.file)
    layers = _layers(stored, model, asked.file)
    stated = stated_alphas(metadata, asked.file)
    with one_sentence(f"the values of {asked.file} can not be read"):
        values = read_tensors(stored)
    for layer in layers:
        parts = {part: values[tensor.name] for part, tensor in layer.tensors.items()}
        module = model.modules[layer.component].get_submodule(layer.path)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        try:
            _add(module, parts, stated.get(layer.component), layer, asked)
        except WrongShapeError as error:
            tensor = layer.tensors[error.part]
            raise TurbopocketError(
                f"{asked.file}: {tensor.name} has shape {list(tensor.shape)}; {layer.component}.{layer.path} of "
                f"{model.name}, whose weight is {list(module.weight.shape)}, needs {error}"
            ) from None


def _add(
    module: nn.Linear | nn.Conv2d,
    parts: dict[str, Tensor],
    stated: StatedAlphas | None,
    layer: AdaptedLayer,
    asked: LoraFile,
) -> None:
    alpha = _alpha(parts.pop("alpha", None), layer, asked.file)
    change = FactoredChange(parts, tuple(module.weight.shape))
    factor = asked.strength
    if change.rank is not None:
        if alpha is None and stated is not None:
            alpha = stated.of(layer.path, change.rank)
        factor *= 1.0 if alpha is None else alpha / change.rank
    weight, bias = module.weight.data, change.bias()
    merged = {"weight": _sum(weight, change.matrix().view_as(weight), factor)}
    if bias is not None:
        merged["bias"] = _sum(torch.zeros_like(bias) if module.bias is None else module.bias.data, bias, factor)
    for name, values in merged.items():
        if values is None:
            raise TurbopocketError(
                f"{asked.file} at strength {asked.strength:g} makes {layer.component}.{layer.path}.{name} overflow fp32"
            )
        setattr(module, name, nn.Parameter(values, requires_grad=False))


def _sum(before: Tensor, change: Tensor, factor: float) -> Tensor | None:
    """Returns before + factor · change, or None where fp32 can not hold that."""
    if abs(factor) > torch.finfo(torch.float32).max:
        return None
    after = torch.add(before, change, alpha=factor)
    return after if torch.stack(after.aminmax()).isfinite().all() else None


def _alpha(stored: Tensor | None, layer: AdaptedLayer, file: Path) -> float | None:
    if stored is None:
        return None
    name = layer.tensors["alpha"].name
    if stored.numel() != 1:
        raise TurbopocketError(f"{file}: {name} has shape {list(stored.shape)}; allowed: one number")
    if (alpha := stored.item()) == 0:
        raise TurbopocketError(
            f"{file}: {name} is 0, which is the rank to some programs and no change to others; allowed: other numbers"
        )
    return alpha


def _layers(stored: Mapping[str, StoredTensor], model: LoadedModel, file: Path) -> list[AdaptedLayer]:
    """Returns what the file holds by layer of the model, every layer found, named once and whole."""
    names, spellings, unknown = LayerNames(model.modules), set(), set()
    layers: dict[tuple[str, str], AdaptedLayer] = {}
    for name, tensor in stored.items():
        split = split_name(name)
        assert split is not None
        spelled, part = split
        spellings.add(spelled)
        place = names.find(spelled)
        if place is None:
            unknown.add(spelled)
            continue
        layer = layers.setdefault(place, AdaptedLayer(*place, spelled))
        if layer.spelled != spelled or part in layer.tensors:
            twin = layer.tensors.get(part) or next(iter(layer.tensors.values()))
            raise TurbopocketError(f"{file}: {twin.name!r} and {name!r} are both of {'.'.join(place)}; one is allowed")
        layer.tensors[part] = tensor
    if unknown:
        raise TurbopocketError(
            f"{file}: {len(unknown)} of its {len(spellings)} layers are not in {model.name}, such as "
            f"{min(unknown)!r}; all must be"
        )
    for layer in layers.values():
        if layer.tensors.keys() - {"alpha"} not in WHOLE:
            parts = ", ".join(sorted(tensor.name for tensor in layer.tensors.values()))
            raise TurbopocketError(f"{file}: {parts} is all it holds of one layer, which is not whole; {ALLOWED}")
    return list(layers.values())
