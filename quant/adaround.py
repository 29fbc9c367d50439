# SPDX-License-Identifier: Apache-2.0
"""Whether each weight is rounded up or down, as a parameter that gradients reach.

Nagel et al., AdaRound (2020, arXiv 2004.10568), equations 22 to 25: ŵ = s · clip(⌊w / s⌋ + h(V)) with the rectified
sigmoid h(V) = clip(σ(V)(ζ - γ) + γ, 0, 1). O outputs, K columns of the matrix view, G groups per row, g columns each.
"""

import torch
from torch import Tensor, nn

from .fit.grids import IntegerGrid
from .formats import Affine, CompressedTensor
from .formats.base import from_matrix_view, matrix_shape, matrix_view
from .formats.bits import pack

ZETA, GAMMA = 1.1, -0.1


class AdaptiveRounding(nn.Module):
    """An integer weight with its scales and zero points fixed, and h(V) between each weight's two neighbours.

    It begins with h(V) = w / s - ⌊w / s⌋, so that the soft weight is the float one, and the hard one the nearest.
    """

    scale_OG1: Tensor
    zero_OG1: Tensor
    floor_OGg: Tensor

    def __init__(self, weight: Tensor, stored: CompressedTensor) -> None:
        """`stored` is `weight` in an integer format; its scales are kept, and its codes are what is learned anew."""
        super().__init__()
        form = stored.format
        assert isinstance(form, Affine)
        _, columns = matrix_shape(stored.shape)
        grid = IntegerGrid(form.bits, form.symmetric, form.group or columns)
        _, scale_OG, zero_OG = form.unpack(stored)
        self.stored, self.form = stored, form
        self.lowest, self.highest = grid.lowest_code, grid.highest_code
        self.register_buffer("scale_OG1", scale_OG.to(weight.device, torch.float32).unsqueeze(-1))
        zero = torch.zeros_like(scale_OG) if zero_OG is None else zero_OG
        self.register_buffer("zero_OG1", zero.to(weight.device, torch.float32).unsqueeze(-1))
        steps_OGg = grid.grouped(matrix_view(weight.detach().float())) / self.scale_OG1 + self.zero_OG1
        floor_OGg = steps_OGg.floor().clamp(self.lowest, self.highest)
        self.register_buffer("floor_OGg", floor_OGg)
        share_OGg = ((steps_OGg - floor_OGg).clamp(0, 1) - GAMMA) / (ZETA - GAMMA)
        self.v_OGg = nn.Parameter(torch.logit(share_OGg))

    def up(self) -> Tensor:
        """h(V) [O, G, g] in 0..1: 1 where the weight is rounded up."""
        return (torch.sigmoid(self.v_OGg) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        """The soft weight, in its own shape."""
        codes_OGg = (self.floor_OGg + self.up()).clamp(self.lowest, self.highest)
        values_OK = ((codes_OGg - self.zero_OG1) * self.scale_OG1).flatten(1)
        return from_matrix_view(values_OK, self.stored.shape)

    def undecided(self, beta: float) -> Tensor:
        """Σ 1 - |2 h(V) - 1|^β: 0 when every weight is rounded one way (equation 24)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> CompressedTensor:
        """The weight with each code rounded the way that V is nearer to."""
        codes_OGg = (self.floor_OGg + (self.up() >= 0.5)).clamp(self.lowest, self.highest)
        dtype = torch.int8 if self.form.symmetric else torch.uint8
        codes = pack(codes_OGg.flatten(1).to("cpu", dtype), self.form.bits)
        return CompressedTensor(self.form, self.stored.shape, self.stored.parts | {"codes": codes})
