# SPDX-License-Identifier: Apache-2.0
"""The weight file of a package: where each tensor lies in it follows from types and shapes alone.

A header of 64 bytes, then for each tensor a header of 64 bytes and its values; both begin at multiples of 64.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ground.bits import pack_bits
from ....runtimes.coreml.file.blobs import ALIGNMENT, BLOB_HEADER, FILE_HEADER, SENTINEL, VERSION
from ....runtimes.coreml.file.dtypes import TensorType


def blob_offsets(tensors: Sequence[TensorType]) -> tuple[list[int], int]:
    """Offset of each tensor's header, and the length of the file."""
    offsets, end = [], FILE_HEADER.size
    for tensor in tensors:
        offsets.append(_aligned(end))
        end = offsets[-1] + BLOB_HEADER.size + tensor.stored_bytes
    return offsets, end


def blob_bytes(tensor: TensorType) -> int:
    """Bytes that one more tensor adds to a file, at most."""
    return BLOB_HEADER.size + _aligned(tensor.stored_bytes)


def write_blobs(path: Path, tensors: Sequence[TensorType], arrays: Iterable[NDArray[Any]]) -> None:
    """Writes the file; values below 8 bits come one per byte and are packed. Holds one array at a time."""
    offsets, _ = blob_offsets(tensors)
    with path.open("wb") as file:
        file.write(FILE_HEADER.pack(len(tensors), VERSION))
        for tensor, offset, array in zip(tensors, offsets, arrays, strict=True):
            stored = stored_values(tensor, array)
            padding_bits = stored.nbytes * 8 - tensor.elements * tensor.dtype.bits
            file.write(bytes(offset - file.tell()))
            data = offset + BLOB_HEADER.size
            file.write(BLOB_HEADER.pack(SENTINEL, tensor.dtype.blob_code, stored.nbytes, data, padding_bits))
            file.write(stored.data)


def stored_values(tensor: TensorType, array: NDArray[Any]) -> NDArray[Any]:
    """The array as it lies in the file. Raises ValueError when it is not such a tensor."""
    if array.dtype != tensor.dtype.numpy or array.shape != tensor.shape:
        raise ValueError(f"found {array.dtype} {list(array.shape)}, {tensor} was laid out")
    contiguous = np.ascontiguousarray(array)
    return contiguous if tensor.dtype.bits >= 8 else pack_bits(contiguous, tensor.dtype.bits)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
