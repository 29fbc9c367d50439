# SPDX-License-Identifier: Apache-2.0
"""Ways to choose codes for a grid: `absmax` (plain), `mse` (best scale), `gptq` (errors fed forward),
`vqdm` (as gptq for integers; sums of codebook vectors by beam search, where the others take residual k-means)."""

from ...ground.errors import TurbopocketError
from .absmax import absmax_codes
from .base import AdditiveCodes, AdditiveGrid, Fit, Grid, GridCodes
from .gptq import gptq_codes
from .mse import mse_codes
from .residual import residual_kmeans
from .vqdm import quick_vqdm_codes, vqdm_codes

ABSMAX = Fit("absmax", needs_hessian=False, choose=absmax_codes, choose_vectors=residual_kmeans)
MSE = Fit("mse", needs_hessian=False, choose=mse_codes, choose_vectors=residual_kmeans)
GPTQ = Fit("gptq", needs_hessian=True, choose=gptq_codes, choose_vectors=residual_kmeans)
VQDM = Fit("vqdm", needs_hessian=True, choose=gptq_codes, choose_vectors=vqdm_codes)
FITS = (ABSMAX, MSE, GPTQ, VQDM)
QUICK_VQDM = Fit("quick vqdm", needs_hessian=True, choose=gptq_codes, choose_vectors=quick_vqdm_codes)

__all__ = [
    "ABSMAX",
    "FITS",
    "GPTQ",
    "MSE",
    "VQDM",
    "AdditiveCodes",
    "AdditiveGrid",
    "Fit",
    "Grid",
    "GridCodes",
    "measuring_fit",
    "parse_fit",
]


def parse_fit(text: str) -> Fit:
    """The fit of that name; TurbopocketError listing the legal names."""
    for fit in FITS:
        if fit.name == text:
            return fit
    raise TurbopocketError(f"`{text}` is not a fit: known are {', '.join(map(str, FITS))}")


def measuring_fit(fit: Fit) -> Fit:
    """The fit whose losses a plan compares: as fair to every format as `fit`, and quick, since it tries them all.

    `mse` puts integers and palettes in the order that the other fits put them in, but sees nothing of what the beam
    search gains for sums of vectors; a plan made with it would avoid them.
    """
    return QUICK_VQDM if fit.name == VQDM.name else MSE
