# SPDX-License-Identifier: Apache-2.0
"""Makes LoRA files for the tiny checkpoints, in the names that trainers give to layers and factors."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.checkpoint.lora.merge import merge_lora
from turbopocket.export.families.base import LoadedModel

RANK = 4


def adaptable(module: nn.Module) -> dict[str, Any]:
    """Returns the layers that a LoRA can be of, by module path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}


def factors(layer: Any, rank: int = RANK, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns (down, up) for a layer, in the shapes that trainers save, large enough to change every output."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs, *taps = layer.weight.shape
    down = 0.2 * torch.randn(rank, inputs, *taps, generator=generator)
    return down, 0.2 * torch.randn(out, rank, *(1 for _ in taps), generator=generator)


def kohya(path: str, component: str = "unet") -> str:
    """Returns what kohya's trainer calls a layer."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{path.replace('.', '_')}"


def kohya_lora(module: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns a LoRA for the UNet layers in `ranks`, each of its own rank; `alphas` may leave layers out."""
    tensors: dict[str, Tensor] = {}
    for seed, (path, rank) in enumerate(ranks.items()):
        down, up = factors(module.get_submodule(path), rank, seed)
        tensors |= {f"{kohya(path)}.lora_down.weight": down, f"{kohya(path)}.lora_up.weight": up}
        if path in alphas:
            tensors[f"{kohya(path)}.alpha"] = torch.tensor(alphas[path])
    return tensors


def copied(model: LoadedModel) -> LoadedModel:
    """Returns the model with a UNet of its own, to merge into."""
    return replace(model, modules={**model.modules, "unet": deepcopy(model.modules["unet"])})


def merged(
    model: LoadedModel, tensors: Mapping[str, Tensor], folder: Path, strength: float = 1.0, **options: Any
) -> LoadedModel:
    """Returns a copy of the model with a LoRA of the UNet merged, which is saved as `lora.safetensors` on the way."""
    save_file(dict(tensors), folder / "lora.safetensors", **options)
    changed = copied(model)
    merge_lora(changed, LoraFile(folder / "lora.safetensors", strength))
    return changed


def other_parameters(module: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Returns the parameters outside the layers at `paths`."""
    layers = set(paths)
    return {name: values for name, values in module.state_dict().items() if name.rpartition(".")[0] not in layers}
