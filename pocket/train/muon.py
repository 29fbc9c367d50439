# SPDX-License-Identifier: Apache-2.0
"""The Muon optimiser for convolutions and linear layers.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; update scale of Liu et al. 2025,
"Muon is Scalable for LLM Training", eq. 4.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the matrix with its singular values set to 1 (they land in about 0.7 to 1.2).

    Every iterate is a polynomial of the first Gram matrix times `matrix`, so the iteration runs on the small
    Gram matrix alone and touches the long side twice.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-12)
    gram = wide @ wide.T
    identity = torch.eye(len(gram))
    product = identity
    for _ in range(_ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ factor @ gram
    result = product @ wide
    return result if matrix.shape[0] <= matrix.shape[1] else result.T


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each weight, seen as a matrix with one row per output.

    Updates have the size AdamW's would have at the same learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                size = 0.2 * max(ahead.shape) ** 0.5
                parameter.add_(orthogonalised(ahead).reshape(parameter.shape), alpha=-group["lr"] * size)


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, adamw_only: tuple[str, ...] = ()
) -> dict[str, torch.optim.Optimizer]:
    """Muon for matrices and convolutions, AdamW at 1e-3 for everything else that asks for a gradient.

    Args:
        adamw_only: name prefixes of matrices that AdamW takes all the same (first and last layers).
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 and not name.startswith(adamw_only) else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
    return {"muon": Muon(matrices, lr=lr), "adamw": adamw}
