# SPDX-License-Identifier: Apache-2.0
"""From the names of a checkpoint as it was first published (LDM, SGM) to those of diffusers and transformers.

The mapping is diffusers' own. Its converters are made for tensors in memory; here they are given stand-ins that
know a shape and remember what is done to them, so that a file of any size is mapped from its header alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter, itemgetter, methodcaller
from typing import TYPE_CHECKING, Any

from ...ground.errors import TurbopocketError
from .header import StoredTensor

if TYPE_CHECKING:  # a file that is refused needs no PyTorch
    from torch import nn

UNET_PREFIX = "model.diffusion_model."
OPEN_CLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
PREFIXES = {
    UNET_PREFIX: "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    **dict(zip(OPEN_CLIP_PREFIXES, ("text_encoder", "text_encoder_2"), strict=True)),
}
"""Which component the tensors of an original checkpoint belong to."""


def in_diffusers_names(
    component: str, part: Mapping[str, StoredTensor], module: "nn.Module"
) -> dict[str, StoredTensor]:
    """Returns the tensors of one component under diffusers' names; `part` has them under the original ones.

    Raises TurbopocketError when one is not known to the mapping, or lacks the shape that it needs.
    """
    file = next(iter(part.values())).file
    try:
        converted = _converted(component, {name: _Recorded(stored) for name, stored in part.items()}, module)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise TurbopocketError(f"{file}: its {component} can not be mapped to diffusers' names: {error!r}") from error
    found = {name: recorded.stored for name, recorded in converted.items() if recorded is not None}
    used = {stored.name for stored in found.values()}
    if unknown := sorted(stored.name for stored in part.values() if stored.name not in used):
        raise TurbopocketError(f"{file}: {len(unknown)} tensors are in no {component} known here, {unknown[0]} first")
    return found


def _converted(component: str, part: dict[str, "_Recorded"], module: Any) -> dict[str, Any]:
    from diffusers.loaders import single_file_utils as diffusers_own

    if component == "unet":
        return diffusers_own.convert_ldm_unet_checkpoint(part, module.config)
    if component == "vae":
        return diffusers_own.convert_ldm_vae_checkpoint(part, module.config)
    for prefix in OPEN_CLIP_PREFIXES:
        if any(name.startswith(prefix) for name in part):
            return diffusers_own.convert_open_clip_checkpoint(module, part, prefix=prefix)
    return diffusers_own.convert_ldm_clip_checkpoint(part)


class _Recorded:
    """Stands in for a stored tensor: has its shape, and remembers what is done to it."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def ndim(self) -> int:
        return len(self.stored.shape)

    @property
    def T(self) -> "_Recorded":  # noqa: N802  a tensor's name for it
        return self._then(attrgetter("T"))

    def __getitem__(self, index: Any) -> "_Recorded":
        picked = index if isinstance(index, tuple) else (index,)
        if any(isinstance(at, int) and size != 1 for at, size in zip(picked, self.shape, strict=False)):
            stored = self.stored  # a convolution of 3 x 3 would become its corner
            raise TurbopocketError(f"{stored.file}: {stored.name} has shape {list(stored.shape)}, a matrix is needed")
        return self._then(itemgetter(index))

    def contiguous(self) -> "_Recorded":
        return self._then(methodcaller("contiguous"))

    def clone(self) -> "_Recorded":
        return self._then(methodcaller("clone"))

    def detach(self) -> "_Recorded":
        return self

    def _then(self, step: Callable[[Any], Any]) -> "_Recorded":
        import torch

        shape = tuple(step(torch.empty(self.shape, device="meta")).shape)
        return _Recorded(replace(self.stored, shape=shape, steps=(*self.stored.steps, step)))
