# SPDX-License-Identifier: Apache-2.0
"""Cross-attention that knows the key and value of the prompt's first token.

Zhao et al., MixDQ (2024), arXiv 2405.17873: CLIP is causal, so what it says of the first token (BOS) is the same for
every prompt, and it is an outlier fifty times as large as the rest, which ruins the ranges of what keys and values are
made of. So these two vectors of every cross-attention are computed here, in float32, and its layers see
tokens 1 to T - 1 alone. B batch, T tokens, D channels of the text states, E of keys and values.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...ground.errors import TurbopocketError
from ...runtimes.compare.metrics import relative_error
from ...runtimes.compare.replay import Call
from ...runtimes.pipeline import Pipeline
from ..families.graphs import Component, UNetModule
from .base import TOLERANCE, Rewrite, Rewritten, own_modules

STATES = "encoder_hidden_states"
"""The denoiser's input that cross-attentions read."""


class TextStates:
    """What all cross-attentions of a UNet read, taken apart once: tokens 1 to T - 1, and whether there is a prompt.

    With `zeros` text states of nothing but zeros stand for no prompt.
    """

    def __init__(self, zeros: bool) -> None:
        self.zeros = zeros
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._with_gradients = False
        self._parts: tuple[Tensor, Tensor | None]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, here or in another process, has taken nothing apart yet."""
        return TextStates, (self.zeros,)

    def parts(self, states_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, T - 1, D], and [B, 1, 1] of 1 for a prompt and 0 for none; None where there always is one."""
        if self._seen() is not states_BTD or self._with_gradients != torch.is_grad_enabled():
            first_B1D = states_BTD[:, :1]
            is_prompt = (first_B1D.abs().amax(dim=-1, keepdim=True) > 0).to(first_B1D.dtype) if self.zeros else None
            self._seen, self._parts = weakref.ref(states_BTD), (states_BTD[:, 1:], is_prompt)
            self._with_gradients = torch.is_grad_enabled()
        return self._parts


class BosAwareProcessor(nn.Module):
    """A cross-attention's processor that appends what `to_k` and `to_v` make of tokens 1 to T - 1 to constants [E].

    Where there is no prompt, the first token is no BOS and has the key and value zero.
    """

    def __init__(self, processor: Any, bos_key: Tensor, bos_value: Tensor, text: TextStates) -> None:
        super().__init__()
        self.processor, self.text = processor, text
        self.bos_key = nn.Parameter(bos_key, requires_grad=False)
        self.bos_value = nn.Parameter(bos_value, requires_grad=False)

    def forward(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        rest, is_prompt = self.text.parts(encoder_hidden_states)

        def beside(layer: nn.Module, constant_E: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda _states: torch.cat([self._of_first(constant_E, rest, is_prompt), layer(rest)], dim=1)

        layers = {
            "to_k": beside(attention.to_k, self.bos_key),
            "to_v": beside(attention.to_v, self.bos_value),
        }
        output: Tensor = self.processor(
            _Replaced(attention, layers), hidden_states, encoder_hidden_states, attention_mask
        )
        return output

    def _of_first(self, constant_E: Tensor, rest: Tensor, is_prompt: Tensor | None) -> Tensor:
        """[B, 1, E]: the constant, zeros where there is no prompt."""
        return constant_E.expand(rest.shape[0], 1, -1) if is_prompt is None else is_prompt * constant_E


class _Replaced:
    """An attention of which some layers are functions; all else is its own."""

    def __init__(self, attention: Any, layers: dict[str, Callable[[Tensor], Tensor]]) -> None:
        self._attention, self._layers = attention, layers

    def __getattr__(self, name: str) -> Any:
        return self._layers.get(name) or getattr(self._attention, name)


class BosAware(Rewrite):
    """Constants for the first token in all cross-attentions of a UNet."""

    name: ClassVar[str] = "bos-aware"
    of_text: ClassVar[bool] = True
    only_these_steps: ClassVar[bool] = False

    def refusal(self, denoiser: Component, pipeline: Pipeline) -> str | None:
        if not isinstance(denoiser.module, UNetModule) or pipeline.denoiser.component != denoiser.name:
            return f"{denoiser.name} has no cross-attention to the states of CLIP, whose first token knows no other"
        if getattr(denoiser.module.model, "encoder_hid_proj", None) is not None:
            return f"{denoiser.name} changes the text states before its cross-attentions read them"
        found = dict(_cross_attentions(denoiser))
        if not found:
            return f"{denoiser.name} has no cross-attention"
        for path, attention in found.items():
            if attention.norm_cross or attention.added_kv_proj_dim or attention.to_k.bias is not None:
                return f"{path} makes its keys of more than the text states"
        return None

    def shaped(self, denoiser: Component, pipeline: Pipeline, timesteps: Sequence[float]) -> Component:
        return _with_constants(denoiser, pipeline, None)

    def made(
        self, denoiser: Component, pipeline: Pipeline, calls: Sequence[Call], timesteps: Sequence[float]
    ) -> Rewritten:
        prompts = [call.inputs[STATES] for call in calls if not self._is_nothing(call.inputs[STATES], pipeline)]
        if len(prompts) < 2:
            raise TurbopocketError(f"{self.name}: {len(prompts)} calls with a prompt were recorded, 2 are needed")
        bos = prompts[0][:1, 0]
        for states in prompts:
            if not (difference := relative_error(states[:, 0], np.broadcast_to(bos, states[:, 0].shape))) <= TOLERANCE:
                raise TurbopocketError(
                    f"{self.name}: the text states of the first token differ by {difference:.3g} between prompts, more "
                    f"than {TOLERANCE:g}: the text encoder is not causal, or a prompt begins with another token"
                )
        others = max(float(np.abs(states[:, 1:]).max()) for states in prompts)
        largest = float(np.abs(bos).max())
        facts = {"largest_bos": largest, "largest_other": others, "ratio": largest / others}
        remark = (
            f"the first token's text states reach {largest:.4g}, those of the others {others:.4g}, "
            f"{largest / others:.3g} times less; cross-attentions have its keys and values as constants"
        )
        return Rewritten(_with_constants(denoiser, pipeline, torch.from_numpy(bos)), facts, remark)

    def _is_nothing(self, states: NDArray[np.float32], pipeline: Pipeline) -> bool:
        return pipeline.without_prompt == "zeros" and not states.any()


def _cross_attentions(component: Component) -> Iterator[tuple[str, Any]]:
    from diffusers.models.attention_processor import Attention

    for path, module in component.module.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            yield path, module


def _with_constants(denoiser: Component, pipeline: Pipeline, bos_1D: Tensor | None) -> Component:
    """The denoiser, whose cross-attentions know the first token; without its state the constants are on no device."""
    rewritten, text = own_modules(denoiser), TextStates(pipeline.without_prompt == "zeros")
    for _, attention in _cross_attentions(rewritten):
        if bos_1D is None:
            width = attention.to_k.out_features
            key, value = torch.empty(width, device="meta"), torch.empty(attention.to_v.out_features, device="meta")
        else:
            with torch.no_grad():
                key, value = (functional.linear(bos_1D, each.weight)[0] for each in (attention.to_k, attention.to_v))
        attention.set_processor(BosAwareProcessor(attention.processor, key, value, text))
    return rewritten
