# SPDX-License-Identifier: Apache-2.0
"""Cross-attention for batches in which several pictures share one caption.

Keys and values of the 77 text states are projected once per caption: two fifths of this UNet's arithmetic is
there, and the other pictures of the caption get it for nothing. Exact; only training uses it.

Shape suffixes: B captions, R pictures per caption, S picture tokens, T text tokens, C channels.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class SharedCaptionAttention:
    """Attention of (B*R, S, C) picture tokens to (B, T, E) text states, pictures of a caption side by side."""

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """(B*R, S, C) attended states; the queries of a caption's R pictures form one long sequence."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        count, heads = len(source), attention.heads

        def split(states: Tensor) -> Tensor:
            # float32: on a CPU the fused attention's bfloat16 gradient takes more than twice as long.
            return states.float().reshape(count, -1, heads, states.shape[-1] // heads).transpose(1, 2)

        query = split(attention.to_q(hidden_states))
        key, value = split(attention.to_k(source)), split(attention.to_v(source))
        with torch.autocast("cpu", enabled=False):
            attended = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        output = nn.Sequential(*attention.to_out)
        result: Tensor = output(attended.reshape(hidden_states.shape))
        return result


def share_captions(unet: UNet2DConditionModel) -> None:
    """Make the UNet take one caption's states for R neighbouring pictures, R = pictures / captions."""
    unet.set_attn_processor(SharedCaptionAttention())


def fold_scales(weight_OI: Tensor, scales_I: Tensor) -> Tensor:
    """The weight that does to plain inputs what `weight_OI` does to inputs divided by `scales_I`."""
    folded = weight_OI.clone()
    folded[:, : len(scales_I)] /= scales_I
    return folded


@torch.no_grad()
def folded_state(unet: UNet2DConditionModel, tokens_E: Tensor, pooled_E: Tensor) -> dict[str, Tensor]:
    """State dict of the UNet that takes raw text states instead of ones divided by channel scales.

    Args:
        tokens_E: scales of the token states; pooled_E: of the pooled output.
    """
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    for name in state:
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = fold_scales(state[name], tokens_E)
    first = "add_embedding.linear_1.weight"
    state[first] = fold_scales(state[first], pooled_E)
    return state
