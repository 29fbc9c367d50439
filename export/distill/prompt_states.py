# SPDX-License-Identifier: Apache-2.0
"""Text states of many prompts at once in PyTorch, for training: what `runtimes.conditioning` computes one by one."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from ...runtimes.drawing.conditioning import picture_numbers
from ...runtimes.drawing.tokenizer import Tokenizer
from ...runtimes.pipeline import Feed, NumbersFeed, TextFeed
from ..checkpoint.load import tokenizer_json
from ..families.base import LoadedModel
from ..families.components import components_of, described
from ..families.graphs import Component


class PromptStates:
    """The text encoders of a model with their tokenizers, frozen, on one device."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        components = components_of(model)
        self._pipeline = model.family.pipeline(model, {each.name: described(each) for each in components})
        self._encoders = {each.name: each for each in components if each.role == "text encoder"}
        for each in self._encoders.values():
            each.module.to(device)
        self._tokenizers = {name: _tokenizer(model, name) for name in self._encoders}

    @torch.no_grad()
    def conditional(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The denoiser's inputs that hold for all steps, such as `encoder_hidden_states` (N, T, D).

        Raises TurbopocketError for a model whose denoiser is told more than outputs of text encoders and sizes.
        """
        encoded = {name: self._encode(encoder, prompts) for name, encoder in self._encoders.items()}
        return {
            name: self._fed(name, feed, encoded, len(prompts)) for name, feed in self._pipeline.denoiser.inputs.items()
        }

    def unconditional(self, conditional: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What guidance steers away from: zeros or the empty prompt, as the model has it."""
        if self._pipeline.without_prompt == "zeros":
            feeds = self._pipeline.denoiser.inputs
            return {n: torch.zeros_like(v) if isinstance(feeds[n], TextFeed) else v for n, v in conditional.items()}
        count = len(next(iter(conditional.values())))
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.conditional([""]).items()}

    def _fed(self, name: str, feed: Feed, encoded: Mapping[str, Mapping[str, Tensor]], count: int) -> Tensor:
        match feed:
            case TextFeed():
                return torch.cat([encoded[each.component][each.output] for each in feed.join], -1)
            case NumbersFeed():
                numbers = torch.from_numpy(picture_numbers(feed, self._model.image_size))
                return numbers.to(self._device).expand(count, -1)
        raise TurbopocketError(f"{self._model.name} can not be distilled: its denoiser is told {name} ({feed.kind})")

    def _encode(self, encoder: Component, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids = np.stack([self._tokenizers[encoder.name].encode(prompt).ids for prompt in prompts])
        outputs = encoder.module(torch.from_numpy(ids).to(self._device))
        return dict(zip(encoder.output_names, outputs, strict=True))


def _tokenizer(model: LoadedModel, encoder: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(tokenizer_json(model.tokenizers[encoder], model.family.tokenizer, model.text_tokens))
        return Tokenizer(file, model.text_tokens, model.prompt_replacements.get(encoder, {}))
