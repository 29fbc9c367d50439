# SPDX-License-Identifier: Apache-2.0
"""Tensors outside the graph: where they lie in the data file is known from names, types and shapes alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""Names of the two files of a component, which lie side by side."""

ALIGNMENT_BYTES = 16
"""Every tensor starts at a multiple of this: more than any element needs, and nearly all sizes are multiples of it.

ONNX Runtime maps the file page by page and accepts any offset, so larger gaps would buy nothing.
"""

_ELEMENT_BITS = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.INT64: 64,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """One initializer of the finished graph; `dtype` is a `TensorProto` number type."""

    name: str
    dtype: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Exact bytes in the data file; two 4-bit elements share a byte."""
        return -(-math.prod(self.shape) * _ELEMENT_BITS[self.dtype] // 8)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def data_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Length of the data file of these tensors."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def external_initializers(tensors: Iterable[StoredTensor], offset: int = 0) -> list[TensorProto]:
    """Initializers that point into the data file, one tensor after the other from `offset` bytes on."""
    initializers = []
    for tensor in tensors:
        proto = TensorProto(name=tensor.name, data_type=tensor.dtype, dims=tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        entries = {"location": DATA_FILE, "offset": str(offset), "length": str(tensor.nbytes)}
        proto.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
        initializers.append(proto)
        offset += aligned(tensor.nbytes)
    return initializers


def write_data(path: Path, arrays: Iterable[tuple[StoredTensor, NDArray[Any]]]) -> None:
    """Writes the data file that `external_initializers` describes; only one array is held at a time."""
    with path.open("wb") as file:
        for tensor, array in arrays:
            if array.nbytes != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {array.nbytes} bytes, {tensor.nbytes} were laid out")
            file.write(np.ascontiguousarray(array).data)
            file.write(bytes(aligned(tensor.nbytes) - tensor.nbytes))
