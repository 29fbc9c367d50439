# SPDX-License-Identifier: Apache-2.0
"""Sums of codebook vectors the plain way: each codebook is made by k-means of what those before it left over, or given.

O outputs, K columns of the matrix view, M codebooks, P entries of one, D length of a vector, J vectors per row.
"""

import torch
from torch import Tensor

from .base import storable_scale
from .grids import AdditiveCodes, AdditiveGrid, summed_vectors
from .hessian import Hessian
from .kmeans import kmeans_importance, nearest_vectors, vector_kmeans
from .universal import universal_codebooks


def residual_kmeans(weight_OK: Tensor, grid: AdditiveGrid, hessian: Hessian | None = None) -> AdditiveCodes:
    """Codes of rows over their scales, weighted by the Hessian's diagonal; the scales are then least squares."""
    outputs, columns = weight_OK.shape
    importance_K = torch.ones(columns) if hessian is None else kmeans_importance(hessian, columns)
    scale_O1 = row_scale(weight_OK)
    # d (w - s c)² = d s² (w / s - c)²
    importance_1ND = (scale_O1.square() * importance_K).reshape(1, -1, grid.length)
    left_1ND = (weight_OK / torch.where(scale_O1 > 0, scale_O1, 1.0)).reshape(1, -1, grid.length)
    codebooks, codes = [], []
    for index in range(grid.count):
        if grid.universal:
            codebook_PD = universal_codebooks(grid.length)[index]
        else:
            codebook_PD = vector_kmeans(left_1ND, importance_1ND, 2**grid.bits)[0].to(torch.float16)
        stored_PD = codebook_PD.to(torch.float32)
        codes_N = nearest_vectors(left_1ND, importance_1ND, stored_PD.unsqueeze(0))[0]
        left_1ND = left_1ND - stored_PD[codes_N.to(torch.int64)]
        codebooks.append(codebook_PD)
        codes.append(codes_N.reshape(outputs, -1))
    codebooks_MPD, codes_MOJ = torch.stack(codebooks), torch.stack(codes)
    rows_OK = summed_vectors(codebooks_MPD.to(torch.float32), codes_MOJ)
    scale_O = least_squares_scale(weight_OK, rows_OK, importance_K, scale_O1.squeeze(1))
    return AdditiveCodes(codes_MOJ, codebooks_MPD, scale_O)


def row_scale(weight_OK: Tensor) -> Tensor:
    """float32 [O, 1], values that fp16 can hold: the root mean square of each row, 0 for a row of zeros."""
    scale_O1 = weight_OK.square().mean(1, keepdim=True).sqrt()
    return torch.where(scale_O1 > 0, storable_scale(scale_O1), 0.0)


def least_squares_scale(weight_OK: Tensor, rows_OK: Tensor, importance_K: Tensor, scale_O: Tensor) -> Tensor:
    """fp16 [O], argmin over scale of Σ d (w - scale * c)²: Σ d w c / Σ d c²; the given one where c is all zeros."""
    projection_O = (weight_OK * rows_OK) @ importance_K
    energy_O = rows_OK.square() @ importance_K
    return torch.where(energy_O > 0, projection_O / energy_O, scale_O).to(torch.float16)
