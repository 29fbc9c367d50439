# SPDX-License-Identifier: Apache-2.0
"""Text states of many prompts at once in PyTorch, for training: what `runtimes.conditioning` computes one by one."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtimes.drawing.tokenizer import Tokenizer
from ..checkpoint.load import tokenizer_json
from ..families.base import LoadedModel


class PromptStates:
    """The text encoders of a model with their tokenizers, frozen, on one device."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._encoders: dict[str, nn.Module] = {
            name: module.to(device) for name, module in model.modules.items() if name.startswith("text_encoder")
        }
        self._tokenizers = {name: _tokenizer(model, name) for name in self._encoders}

    @torch.no_grad()
    def conditional(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (N, T, D), and for SDXL `text_embeds` (N, P) and `time_ids` (N, 6)."""
        encoded = {name: self._encode(name, encoder, prompts) for name, encoder in self._encoders.items()}
        if self._model.family.name == "sd":
            return {"encoder_hidden_states": encoded["text_encoder"].last_hidden_state}
        size = self._model.image_size
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self._device)
        return {
            "encoder_hidden_states": torch.cat([outputs.hidden_states[-2] for outputs in encoded.values()], -1),
            "text_embeds": encoded["text_encoder_2"].text_embeds,
            "time_ids": time_ids.expand(len(prompts), -1),
        }

    def unconditional(self, conditional: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What guidance steers away from: zeros or the empty prompt, as the model has it."""
        if self._model.pipeline_config.get("force_zeros_for_empty_prompt", False):
            return {n: value if n == "time_ids" else torch.zeros_like(value) for n, value in conditional.items()}
        count = len(conditional["encoder_hidden_states"])
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.conditional([""]).items()}

    def _encode(self, name: str, encoder: nn.Module, prompts: Sequence[str]) -> Any:
        ids = np.stack([self._tokenizers[name].encode(prompt).ids for prompt in prompts])
        return encoder(torch.from_numpy(ids).to(self._device), output_hidden_states=True)


def _tokenizer(model: LoadedModel, encoder: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(tokenizer_json(model.tokenizers[encoder], model.family.tokenizer, model.text_tokens))
        return Tokenizer(file, model.text_tokens, model.prompt_replacements.get(encoder, {}))
