# SPDX-License-Identifier: Apache-2.0
"""A small model with every kind of layer the compressor meets, and inputs whose columns are correlated."""

import pytest
import torch
from torch import Tensor, nn


class TinyDenoiser(nn.Module):
    """A convolution with stride, one with groups, a linear layer, and one linear layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.to_out = nn.Linear(16, 8)
        self.unused = nn.Linear(4, 4)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.depthwise(self.down(torch.tanh(self.conv_in(latents))))
        return self.to_out(torch.tanh(hidden).flatten(2).transpose(1, 2))


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def denoiser() -> nn.Module:
    return TinyDenoiser().eval()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8)


@pytest.fixture
def correlated_hessian() -> Tensor:
    """E[x xᵀ] of 48 columns driven by 12 directions of very different strength, and a little noise."""
    directions_DK = torch.randn(12, 48) * torch.logspace(0, -1.5, 12).unsqueeze(1)
    x_NK = torch.randn(2000, 12) @ directions_DK + 0.02 * torch.randn(2000, 48)
    return x_NK.T @ x_NK / 2000
