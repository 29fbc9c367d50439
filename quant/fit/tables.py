# SPDX-License-Identifier: Apache-2.0
"""Tables of values, and codebooks of vectors, by k-means that counts each column by the Hessian's diagonal.

O outputs, K columns of the matrix view, G tables or codebooks, N values or vectors that share one, P entries,
D length of a vector, R rows and C columns of codes.
"""

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from .grids import TableCodes, TableGrid, VectorCodes, VectorGrid
from .hessian import Hessian
from .kmeans import LARGEST_VALUE, kmeans_importance, nearest_values, nearest_vectors, value_kmeans, vector_kmeans
from .residual import least_squares_scale, row_scale


def table_kmeans(weight_OK: Tensor, grid: TableGrid, hessian: Hessian | None = None) -> TableCodes:
    """Tables of least Σ H[k, k] (w - nearest entry)², or of the plain squared error; TurbopocketError for a weight that
    fp16 can not hold, and for a Hessian of another size."""
    largest = float(weight_OK.abs().max())
    if largest > LARGEST_VALUE:
        raise TurbopocketError(f"the largest weight is {largest:.6g}, and fp16 tables end at {LARGEST_VALUE:.0f}")
    outputs, columns = weight_OK.shape
    values_GN = weight_OK.reshape(outputs // (grid.rows or outputs), -1)
    importance_K = None if hessian is None else kmeans_importance(hessian, columns)
    table_GP = value_kmeans(values_GN, importance_K, 2**grid.bits).to(torch.float16)
    codes_GN = nearest_values(values_GN, table_GP.to(torch.float32))
    return TableCodes(codes_GN.reshape(outputs, columns), table_GP)


def codebook_kmeans(weight_OK: Tensor, grid: VectorGrid, hessian: Hessian | None = None) -> VectorCodes:
    """Codebooks of the rows over their scales, weighted by the Hessian's diagonal; the scales are then least squares.

    TurbopocketError for a scale that fp16 can not hold, and for a Hessian of another size.
    """
    outputs, columns = weight_OK.shape
    importance_K = torch.ones(columns) if hessian is None else kmeans_importance(hessian, columns)
    scale_O1 = row_scale(weight_OK)
    points_GND = grid.vectors(weight_OK / torch.where(scale_O1 > 0, scale_O1, 1.0))
    # d (w - s c)² = d s² (w / s - c)²
    importance_GND = grid.vectors(scale_O1.square() * importance_K)
    codebook_GPD = vector_kmeans(points_GND, importance_GND, 2**grid.bits).to(torch.float16)
    codes_GN = nearest_vectors(points_GND, importance_GND, codebook_GPD.to(torch.float32))
    codes_RC = codes_GN.reshape(grid.codes_shape(outputs, columns))
    rows_OK = grid.rows_of(codes_RC, codebook_GPD)
    scale_O = least_squares_scale(weight_OK, rows_OK, importance_K, scale_O1.squeeze(1))
    return VectorCodes(grid, codes_RC, codebook_GPD, scale_O)
