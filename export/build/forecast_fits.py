# SPDX-License-Identifier: Apache-2.0
"""What fits take of one layer: seconds from small layers fitted here and now, memory from what solvers keep.

O outputs, K columns of a layer's weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...quant.fit import Fit
from ...quant.fit.threads import one_thread
from ...quant.formats import Affine, Dense, LayerFormat
from .forecast_rates import Rates, seconds_of
from .forecast_work import LayerWork

SAMPLE_ROWS, SAMPLE_COLUMNS = (64, 256), (256, 1024)
"""O and K of the layers that are fitted: enough for what each column, each weight and each weight's columns cost."""
WEIGHT_COPIES = 6
"""Of a layer's weight in float32: it, its groups, scaled and rounded numbers, codes, and what is to be written."""
FACTOR_FLOPS = 1 / 3
"""Times K³: a Cholesky factorisation, in place."""


@dataclass(frozen=True)
class FitCost:
    """Seconds of a fit in one thread: for each layer, each column, each weight, and each weight times K. `whole` says
    that it also factors a [K, K] matrix, `in_turn` that columns wait for each other, so that rows are not shared."""

    layer: float = 0.0
    column: float = 0.0
    weight: float = 0.0
    weight_column: float = 0.0
    whole: bool = False
    in_turn: bool = False

    def seconds(self, layer: LayerWork, rates: Rates) -> float:
        """Of one layer in one format, with this process's threads."""
        columns, weights = layer.columns, layer.weights
        factor = FACTOR_FLOPS * columns**3 / rates.flops if self.whole else 0.0
        shared = weights * (self.weight + self.weight_column * columns)
        shared /= 1 if self.in_turn else torch.get_num_threads()
        return self.layer + self.column * columns + shared + factor


def fit_cost(layer_format: LayerFormat, fit: Fit, rates: Rates) -> FitCost:
    """Fits small layers of random numbers, each once more than it counts; measured once by format and fit."""
    key = layer_format, fit.name, rates
    if key not in _KNOWN:
        _KNOWN[key] = _measured(layer_format, fit, rates)
    return _KNOWN[key]


_KNOWN: dict[tuple[LayerFormat, str, Rates], FitCost] = {}


def _measured(layer_format: LayerFormat, fit: Fit, rates: Rates) -> FitCost:
    few_rows, many_rows = SAMPLE_ROWS
    fitting = (each for each in range(SAMPLE_COLUMNS[0], 8192, 8) if layer_format.fits((few_rows, each)) is None)
    columns = next(fitting, None)
    if columns is None:
        return FitCost()
    more_columns = columns * SAMPLE_COLUMNS[1] // SAMPLE_COLUMNS[0]
    whole = fit.whole_hessian and not isinstance(layer_format, Dense)

    def seconds(outputs: int, columns: int) -> float:
        found = _sample(layer_format, fit, outputs, columns)
        return max(found - FACTOR_FLOPS * columns**3 / rates.flops, found / 10) if whole else found

    few, many = seconds(few_rows, columns), seconds(many_rows, columns)
    wide = seconds(few_rows, more_columns) if whole else 0.0
    weight = max(0.0, many - few) / ((many_rows - few_rows) * columns)
    rest = max(0.0, few - few_rows * columns * weight)
    if not whole:
        return FitCost(layer=rest, weight=weight)
    column = rest / columns
    grown = max(0.0, wide - more_columns * (column + few_rows * weight))
    grown /= few_rows * more_columns * (more_columns - columns)
    return FitCost(0.0, column, weight, grown, whole, in_turn=isinstance(layer_format, Affine))


def _sample(layer_format: LayerFormat, fit: Fit, outputs: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    hessian = (x.T @ x) / len(x) if fit.whole_hessian else x.square().mean(0)
    with one_thread():  # a thread that waits for others on a busy machine takes its own time for that
        return seconds_of(lambda: layer_format.compress(weight, fit, hessian), least_seconds=0.01)


def fit_bytes(layer: LayerWork, fit: Fit, formats: Sequence[LayerFormat]) -> float:
    """The most that fitting a layer in these formats holds at once: its weight and copies, what is stored, and for a
    whole Hessian that in float32, factored in place (`quant.fit.hessian`)."""
    stored = sum(each.nbytes(layer.shape) for each in formats)
    hessian = 4.3 * layer.columns**2 if fit.whole_hessian else 0.0
    return 4 * WEIGHT_COPIES * layer.weights + hessian + stored
