# SPDX-License-Identifier: Apache-2.0
"""What is exported in place of PyTorch's functions has their results."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from turbopocket.export.targets.executorch.rewrite import attention, chunk


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_as_exported_is_pytorchs(mask: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, rows, 8) for rows in (5, 7, 7))
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    given: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.where(allowed, 0.0, -torch.inf), "scale": 0.7},
    }[mask]
    expected = F.scaled_dot_product_attention(query, key, value, **given)
    assert torch.allclose(attention(query, key, value, **given), expected, atol=1e-6)


def test_chunks_as_exported_are_pytorchs() -> None:
    x = torch.randn(2, 3, 8)
    for found, expected in zip(chunk(x, 2, dim=-1), x.chunk(2, dim=-1), strict=True):
        assert torch.equal(found, expected)
