# SPDX-License-Identifier: Apache-2.0
"""Ways to choose codes: `absmax` (plain), `mse` (best scale), `gptq` (errors fed forward) for integers, and `vqdm` (as
gptq for integers, sums of codebook vectors by beam search), and `reconstruct` (as mse, and rounding learned block by
block). Other grids take k-means in all of them."""

from typing import Any

from ..names import known_fit
from .absmax import absmax_codes
from .base import Fit, Solver
from .gptq import gptq_codes
from .grids import (
    AdditiveCodes,
    AdditiveGrid,
    Grid,
    IntegerCodes,
    IntegerGrid,
    TableCodes,
    TableGrid,
    VectorCodes,
    VectorGrid,
)
from .mse import mse_codes
from .residual import residual_kmeans
from .tables import codebook_kmeans, table_kmeans
from .vqdm import quick_vqdm_codes, vqdm_codes

SOLVERS: dict[type[Grid[Any]], Solver] = {
    IntegerGrid: mse_codes,
    TableGrid: table_kmeans,
    VectorGrid: codebook_kmeans,
    AdditiveGrid: residual_kmeans,
}
"""What a fit does with a grid that it has no better way for."""

MSE = Fit("mse", SOLVERS)
# Compared as it is shipped: its integers know nothing of activations, whose last digits depend on threads.
# `mse` may then take the scale beside for a group, and the loss of a layer jumps.
ABSMAX = Fit("absmax", SOLVERS | {IntegerGrid: absmax_codes})
GPTQ = Fit("gptq", SOLVERS | {IntegerGrid: gptq_codes}, measuring=MSE, whole_hessian=True)
# `mse` puts integers and palettes in the order that the other fits put them in, but sees nothing of what the beam
# search gains for sums of vectors; a plan made with it would avoid them.
QUICK_VQDM = Fit("quick vqdm", {**GPTQ.solvers, AdditiveGrid: quick_vqdm_codes}, whole_hessian=True)
VQDM = Fit("vqdm", {**GPTQ.solvers, AdditiveGrid: vqdm_codes}, measuring=QUICK_VQDM, whole_hessian=True)
# Scales and first codes are those of `mse`; which way each weight of a denoiser is rounded is then learned, block by
# block (`quant.reconstruct`), which is no function of one layer's weight.
RECONSTRUCT = Fit("reconstruct", MSE.solvers, measuring=MSE)
FITS = (ABSMAX, MSE, GPTQ, VQDM, RECONSTRUCT)

__all__ = [
    "ABSMAX",
    "FITS",
    "GPTQ",
    "MSE",
    "RECONSTRUCT",
    "VQDM",
    "AdditiveCodes",
    "AdditiveGrid",
    "Fit",
    "Grid",
    "IntegerCodes",
    "IntegerGrid",
    "TableCodes",
    "TableGrid",
    "VectorCodes",
    "VectorGrid",
    "measuring_fit",
    "parse_fit",
]


def parse_fit(text: str) -> Fit:
    """The fit of that name; TurbopocketError listing the legal names."""
    name = known_fit(text)
    return next(fit for fit in FITS if fit.name == name)


def measuring_fit(fit: Fit) -> Fit:
    """The fit whose losses a plan for `fit` compares."""
    return fit.measuring or fit
