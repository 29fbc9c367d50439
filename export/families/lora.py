# SPDX-License-Identifier: Apache-2.0
"""Merging LoRA files into a model's weights (Hu et al. 2021, eq. 3: W + (alpha / r) B A)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...runtimes.errors import TurbopocketError
from .base import LoadedModel, ModelFamily
from .safetensors_header import read_header

# One such tensor a layer, in the dialects of peft, kohya and older diffusers.
DOWN_PROJECTION = re.compile(r"(lora_A|lora[._]down|lora_linear_layer\.down)(\.\w+)?\.weight$")


def merge_lora(model: LoadedModel, family: ModelFamily, file: Path) -> None:
    """Afterwards the model's weights hold the LoRA, and its modules are plain layers again.

    Raises TurbopocketError when the file is not a safetensors LoRA, or any of its layers is not in the model.
    """
    layers = _adapted_layer_count(file)
    pipeline = _pipeline(model, family)
    components = [name for name in family.modules if name in pipeline._lora_loadable_modules]
    with _errors_only():
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise TurbopocketError(f"{file} does not fit {model.name}: {_first_line(error)}") from error
        matched = sum(_tuner_layer_count(model.modules[name]) for name in components)
        if matched != layers:
            raise TurbopocketError(
                f"{file}: {matched} of its {layers} layers are in {model.name}, all must be"
            )
        pipeline.fuse_lora(components=components)
        pipeline.unload_lora_weights()
    for module in model.modules.values():
        module.eval().requires_grad_(False)


def _adapted_layer_count(file: Path) -> int:
    if not file.is_file():
        raise TurbopocketError(f"the LoRA {file} does not exist")
    if file.suffix != ".safetensors":
        raise TurbopocketError(
            f"the LoRA {file} is a {file.suffix or 'nameless'} file; allowed: .safetensors"
        )
    names = read_header(file)
    if any("dora_scale" in name for name in names):
        raise TurbopocketError(f"{file} is a DoRA, whose magnitudes cannot be merged; allowed: LoRA")
    layers = sum(DOWN_PROJECTION.search(name) is not None for name in names)
    if not layers:
        raise TurbopocketError(f"{file} is not a LoRA: none of its {len(names)} tensors is a down projection")
    return layers


def _pipeline(model: LoadedModel, family: ModelFamily) -> Any:
    import diffusers

    parts = {name: None for name in family.folders}
    pipeline_class = getattr(diffusers, family.pipeline_class)
    optional = {"safety_checker": None, "feature_extractor": None} if family.name == "sd" else {}
    return pipeline_class(**{**parts, **model.modules, **optional})


def _tuner_layer_count(module: Any) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(part, BaseTunerLayer) for part in module.modules())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silences diffusers' warnings that a LoRA does not touch every component, which is usual."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
