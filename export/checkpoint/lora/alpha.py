# SPDX-License-Identifier: Apache-2.0
"""Alphas that diffusers writes beside a LoRA's tensors, into the file's metadata: peft's LoraConfig as JSON."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ground.errors import TurbopocketError
from ....ground.reading import parse_json
from .names import PREFIXES

KEY = "lora_adapter_metadata"
_MODULE = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class StatedAlphas:
    """What one LoraConfig says of strengths. Nothing else of it is read, and none of its regular expressions run."""

    alpha: float
    by_module: Mapping[str, float] = field(default_factory=dict)
    """Alpha of single modules, by path; one without ^ may leave out the path's beginning."""
    by_root: bool = False
    """Whether alpha is divided by the root of the rank instead of the rank (Kalajdzievski 2023)."""

    def of(self, path: str, rank: int) -> float:
        """Returns alpha as it is divided by the rank."""
        bare = path.removeprefix("text_model.")
        named = (alpha for module, alpha in self.by_module.items() if _is(module, bare))
        alpha = next(named, self.alpha)
        return alpha * math.sqrt(rank) if self.by_root else alpha


def stated_alphas(metadata: Mapping[str, Any], file: Path) -> dict[str, StatedAlphas]:
    """Returns what a safetensors file's metadata states, by component (`unet`, `text_encoder`, ...); mostly nothing.

    Raises TurbopocketError when diffusers' entry is there but its alphas are not finite numbers other than 0, or are
    told by a regular expression.
    """
    if KEY not in metadata:
        return {}
    if not isinstance(metadata[KEY], str):
        raise TurbopocketError(f"{file}: {KEY} is a JSON {type(metadata[KEY]).__name__}; text is needed")
    entry = parse_json(metadata[KEY], f"{file}: {KEY}")
    if not isinstance(entry, dict):
        raise TurbopocketError(f"{file}: {KEY} holds a JSON {type(entry).__name__}; an object is needed")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entry.items():
        component, _, name = key.rpartition(
            "."
        )  # a UNet saved by itself has no prefix, neither here nor of its tensors
        configs.setdefault(component or "unet", {})[name] = value
    return {
        component: _stated(configs[component], f"{file}: {KEY} of {component}")
        for component in PREFIXES.keys() & configs.keys()
    }


def _stated(config: Mapping[str, Any], where: str) -> StatedAlphas:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise TurbopocketError(f"{where}: peft_type is {kind!r}; allowed: 'LORA'")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TurbopocketError(f"{where}: alpha_pattern is a JSON {type(patterns).__name__}; an object is needed")
    for module in patterns:
        if not _MODULE.fullmatch(module):
            raise TurbopocketError(f"{where}: alpha_pattern has {module!r}; allowed: module paths")
    alphas = {module: _number(alpha, where) for module, alpha in patterns.items()}
    return StatedAlphas(_number(config.get("lora_alpha"), where), alphas, bool(config.get("use_rslora")))


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
        raise TurbopocketError(f"{where}: alpha is {value!r}; allowed: a finite number other than 0")
    return float(value)


def _is(module: str, path: str) -> bool:
    whole = module.removeprefix("^").removeprefix("text_model.")
    return path == whole or (not module.startswith("^") and path.endswith(f".{whole}"))
