# SPDX-License-Identifier: Apache-2.0
"""Merging LoRA files into a model's weights (Hu et al. 2021, eq. 3: W + (alpha / r) B A)."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...runtimes.errors import TurbopocketError
from .base import LoadedModel, ModelFamily
from .safetensors_header import read_header
from .weights import read_tensors

# One such tensor a layer, in the dialects of peft, kohya and older diffusers.
DOWN_PROJECTION = re.compile(r"(lora_A|lora[._]down|lora_linear_layer\.down)(\.\w+)?\.weight$")


def merge_lora(model: LoadedModel, family: ModelFamily, file: Path) -> None:
    """Afterwards the model's weights hold the LoRA, and its modules are plain layers again.

    Raises TurbopocketError when the file is not a safetensors LoRA, or any of its layers is not in the model.
    """
    layers = _adapted_layer_count(file)
    with _quiet():
        pipeline = _pipeline(model, family)
        components = [name for name in family.modules if name in pipeline._lora_loadable_modules]
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise TurbopocketError(f"{file} does not fit {model.name}: {_start(error)}") from error
        matched = sum(_tuner_layer_count(model.modules[name]) for name in components)
        if matched != layers:
            raise TurbopocketError(f"{file}: {matched} of its {layers} layers are in {model.name}, all must be")
        pipeline.fuse_lora(components=components)
        pipeline.unload_lora_weights()
    for module in model.modules.values():
        module.eval().requires_grad_(False)


def _adapted_layer_count(file: Path) -> int:
    if not file.is_file():
        raise TurbopocketError(f"the LoRA {file} does not exist")
    if file.suffix != ".safetensors":
        raise TurbopocketError(f"the LoRA {file} is a {file.suffix or 'nameless'} file; allowed: .safetensors")
    tensors = read_header(file)
    if any("dora_scale" in name for name in tensors):
        raise TurbopocketError(f"{file} is a DoRA, whose magnitudes cannot be merged; allowed: LoRA")
    layers = sum(DOWN_PROJECTION.search(name) is not None for name in tensors)
    if not layers:
        raise TurbopocketError(f"{file} is not a LoRA: none of its {len(tensors)} tensors is a down projection")
    read_tensors(tensors)  # refuses NaN and infinity
    return layers


def _pipeline(model: LoadedModel, family: ModelFamily) -> Any:
    import diffusers

    pipeline_class = getattr(diffusers, family.pipeline_class)
    parameters = inspect.signature(pipeline_class).parameters.values()
    required = {part.name: None for part in parameters if part.default is part.empty}
    return pipeline_class(**{**required, **model.modules})


def _tuner_layer_count(module: Any) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(part, BaseTunerLayer) for part in module.modules())


def _start(error: Exception) -> str:
    """Returns a message's first two lines as one: for a state dict, what went wrong and the first place."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries: that a LoRA leaves some components alone is usual, and errors are raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bars_before = transformers_logging.is_progress_bar_enabled()
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
        if bars_before:
            transformers_logging.enable_progress_bar()
