# SPDX-License-Identifier: Apache-2.0
"""Codebooks for any matrix: of vectors of independent normal numbers, which rows over their scales nearly are.

Layers that take them need none of their own: on a layer of 64 x 64 these weigh more than its codes. QuIP# (Tseng et al.
2024, section 4) also has one codebook for all layers, a lattice, behind rotations that make weights normal; here
fine-tuning may move the codebooks of a component, for all its layers alike.

`write_codebooks` makes the file again.
"""

from functools import cache
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from ...ground.errors import TurbopocketError
from ..names import SHARED_LENGTHS
from .kmeans import nearest_vectors, vector_kmeans

FILE = "universal.safetensors"
MOST_CODEBOOKS, ENTRIES = 4, 256
SAMPLES = 200_000


@cache
def universal_codebooks(length: int) -> Tensor:
    """fp16 [4, 256, D] of vectors of that length, each codebook for what those before it leave over.

    Raises TurbopocketError for a length that has none.
    """
    if length not in SHARED_LENGTHS:
        raise TurbopocketError(f"there are universal codebooks for vectors of {SHARED_LENGTHS}, not of {length}")
    return load(resources.files(__package__).joinpath(FILE).read_bytes())[f"d{length}"]


def made_codebooks(length: int) -> Tensor:
    """The same from nothing: residual k-means of normal vectors."""
    left_1ND = torch.randn(1, SAMPLES, length, generator=torch.Generator().manual_seed(0))
    even_1ND, codebooks = torch.ones_like(left_1ND), []
    for _ in range(MOST_CODEBOOKS):
        codebook_1PD = vector_kmeans(left_1ND, even_1ND, ENTRIES).to(torch.float16)
        stored_PD = codebook_1PD[0].to(torch.float32)
        left_1ND = left_1ND - stored_PD[nearest_vectors(left_1ND, even_1ND, stored_PD.unsqueeze(0))[0].to(torch.int64)]
        codebooks.append(codebook_1PD[0])
    return torch.stack(codebooks)


def write_codebooks() -> None:
    """Writes the file of this package."""
    save_file({f"d{length}": made_codebooks(length) for length in SHARED_LENGTHS}, Path(__file__).parent / FILE)
