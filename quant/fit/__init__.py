# SPDX-License-Identifier: Apache-2.0
"""Ways to choose codes for a grid: `absmax` (plain), `mse` (best scale), `gptq` (errors fed forward),
`vqdm` (as gptq for integers; sums of codebook vectors by beam search, where the others take residual k-means)."""

from dataclasses import replace

from ..errors import QuantError
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
    "parse_fit",
    "quick",
]


def parse_fit(text: str) -> Fit:
    """The fit of that name; QuantError listing the legal names."""
    for fit in FITS:
        if fit.name == text:
            return fit
    raise QuantError(f"`{text}` is not a fit: known are {', '.join(map(str, FITS))}")


def quick(fit: Fit) -> Fit:
    """A cheap fit whose losses say which format suits a layer, when `fit` then stores it.

    `mse` for all but `vqdm`: residual k-means is several dB worse than vqdm's search, so a planner that read its losses
    would pass codebooks over. Integers are then fitted by `gptq`, as vqdm does it, so that neither side is undervalued.
    """
    return replace(VQDM, choose_vectors=quick_vqdm_codes) if fit.name == VQDM.name else MSE
