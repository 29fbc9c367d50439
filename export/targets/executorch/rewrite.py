# SPDX-License-Identifier: Apache-2.0
"""Functions of PyTorch in a form that XNNPACK takes whole, put in their place while a component is exported.

Exact rewrites of one expression into another: attention as batched products of three dimensions (XNNPACK has no
other, and PyTorch's own decomposition guards against rows of nothing but masked scores, in eight operators that it
does not have), and `chunk` as slices.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MASKED = -1e9
"""exp of it is 0 in float32, as that of minus infinity, and differences of two are numbers."""


class Rewritten(TorchFunctionMode):
    """While the block runs, calls are replaced by ones of equal result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REWRITES.get(func, func)(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V over [B, heads, T, d] tensors, by products of [B · heads, …] ones."""
    if dropout_p or enable_gqa:
        raise ValueError(f"attention with {dropout_p=}, {enable_gqa=} has no rewrite")
    batch, heads, rows, width = query.shape
    columns = key.shape[-2]
    query_HTd = query.reshape(batch * heads, rows, width) * (scale if scale is not None else width**-0.5)
    scores = torch.bmm(query_HTd, key.reshape(batch * heads, columns, width).transpose(1, 2))
    if is_causal:
        attn_mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, MASKED) if attn_mask.dtype == torch.bool else attn_mask.clamp(min=MASKED)
        scores = scores + bias.expand(batch, heads, rows, columns).reshape(batch * heads, rows, columns)
    out = torch.bmm(scores.softmax(-1), value.reshape(batch * heads, columns, value.shape[-1]))
    return out.reshape(batch, heads, rows, value.shape[-1])


def chunk(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """Equal parts of x along a dimension. Raises ValueError when they are not equal."""
    width, left = divmod(x.shape[dim], chunks)
    if left:
        raise ValueError(f"{x.shape[dim]} is not a multiple of {chunks} chunks")
    return tuple(x.narrow(dim, index * width, width) for index in range(chunks))


_REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    torch.Tensor.chunk: chunk,
    torch.chunk: chunk,
}
