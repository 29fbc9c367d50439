# SPDX-License-Identifier: Apache-2.0
"""The change of one layer's weight, from the factors in which a LoRA, LoHa or LoKr file stores it.

LoRA: Hu et al. 2021, eq. 3. LoHa: Hyeon-Woo et al. 2021 (FedPara), section 2.2. LoKr, and all three on convolutions
with a core tensor: Yeh et al. 2023 (LyCORIS), section 3.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_LORA = frozenset({"down", "up"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_LOKR_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
WHOLE = frozenset(
    {
        *(_LORA | optional for optional in (set(), {"mid"}, {"bias"}, {"mid", "bias"})),
        *(_LOHA | optional for optional in (set(), {"hada_t1", "hada_t2"})),
        *(first | second for first in _LOKR_FIRST for second in _LOKR_SECOND),
    }
)
"""The sets of parts, alpha aside, that are one layer's whole change."""

_RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # parts whose rows are the rank


class WrongShapeError(ValueError):
    """A part that fits neither the layer nor the other parts; the message is what it has to be, such as "[4, 32]"."""

    def __init__(self, part: str, needed: str) -> None:
        super().__init__(needed)
        self.part = part


class FactoredChange:
    """The parts of one layer's change, whose names are one of WHOLE, as one matrix [O, I·kh·kw].

    `weight_shape` is [O, I] of a Linear or [O, I, kh, kw] of a Conv2d. A Linear counts as a convolution of one tap,
    and a convolution's taps may be flattened into columns, so parts made for one kind fit the other where that says
    the same. Raises WrongShapeError, at once or by `matrix`.
    """

    def __init__(self, parts: Mapping[str, Tensor], weight_shape: tuple[int, ...]) -> None:
        self._parts = parts
        self._rows, self._columns, *taps = weight_shape
        self._taps = tuple(taps) or (1, 1)
        for part, values in parts.items():
            if part != "bias" and values.dim() not in (2, 4):
                raise WrongShapeError(part, "2 or 4 dimensions")
        ranked = next((part for part in _RANKED if part in parts), None)
        self.rank = None if ranked is None else parts[ranked].shape[0]
        """What alpha is divided by; None where no part is of low rank, and alpha says nothing."""
        if ranked is not None and self.rank == 0:
            raise WrongShapeError(ranked, "a rank of 1 or more")

    def matrix(self) -> Tensor:
        """Returns the change before alpha, rank and strength: B A, (A₁ B₁) ⊙ (A₂ B₂) or C ⊗ D; fp32 [O, I·kh·kw]."""
        if "hada_w1_a" in self._parts:
            first = self._product("hada_w1_a", "hada_w1_b", "hada_t1", self._rows, self._columns)
            return first * self._product("hada_w2_a", "hada_w2_b", "hada_t2", self._rows, self._columns)
        return self._lora() if "down" in self._parts else self._lokr()

    def bias(self) -> Tensor | None:
        """Returns the change of the layer's bias before alpha, rank and strength, fp32 [O], or None."""
        bias = self._parts.get("bias")
        if bias is not None and bias.shape != (self._rows,):
            raise WrongShapeError("bias", str([self._rows]))
        return bias

    def _lora(self) -> Tensor:
        rank = self.rank or 0
        up = self._part("up", self._rows, rank)
        if "mid" not in self._parts:
            return up @ self._part("down", rank, self._columns, self._taps)
        down = self._part("down", rank, self._columns)
        return _with_core(self._part("mid", rank, rank, self._taps), up.T, down)

    def _lokr(self) -> Tensor:
        """A Kronecker product: every value of a small first matrix is a block, the second matrix times that value."""
        if (whole := self._parts.get("lokr_w1")) is not None:
            rows, columns = whole.shape[:2]
            first = self._part("lokr_w1", rows, columns)
        else:
            rows, columns = self._parts["lokr_w1_a"].shape[0], self._parts["lokr_w1_b"].shape[1]
            first = self._product("lokr_w1_a", "lokr_w1_b", "", rows, columns, taps=(1, 1))
        if not first.numel() or self._rows % rows or self._columns % columns:
            needed = f"numbers of rows and columns that divide {[self._rows, self._columns]}"
            raise WrongShapeError("lokr_w1_a" if whole is None else "lokr_w1", needed)
        rows, columns = self._rows // rows, self._columns // columns
        if "lokr_w2" in self._parts:
            return torch.kron(first, self._part("lokr_w2", rows, columns, self._taps))
        return torch.kron(first, self._product("lokr_w2_a", "lokr_w2_b", "lokr_t2", rows, columns))

    def _product(
        self, a: str, b: str, core: str, rows: int, columns: int, taps: tuple[int, ...] | None = None
    ) -> Tensor:
        """Returns [rows, columns·taps] from LyCORIS's low-rank pair; with a core tensor it stores `a` transposed."""
        rank, taps = self.rank or 0, taps or self._taps
        if core in self._parts:
            middle = self._part(core, rank, rank, taps)
            return _with_core(middle, self._part(a, rank, rows), self._part(b, rank, columns))
        return self._part(a, rows, rank) @ self._part(b, rank, columns, taps)

    def _part(self, part: str, rows: int, columns: int, taps: tuple[int, ...] = (1, 1)) -> Tensor:
        """Returns a part as a matrix [rows, columns·taps]."""
        values = self._parts[part]
        if tuple(values.shape) not in ((rows, columns, *taps), (rows, columns * math.prod(taps))):
            needed = [rows, columns] if taps == (1, 1) else [rows, columns, *taps]
            raise WrongShapeError(part, str(needed))
        return values.flatten(1)


def _with_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns Σ core[p, q, taps] a[p, rows] b[q, columns] as [rows, columns·taps]: a Tucker decomposition.

    `core` is [rank, rank·taps], `a` [rank, rows], `b` [rank, columns].
    """
    return torch.einsum("pqt,po,qi->oit", core.unflatten(1, (core.shape[0], -1)), a, b).flatten(1)
