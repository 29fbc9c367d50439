# SPDX-License-Identifier: Apache-2.0
"""Element types of ML programs, and values of fewer than 8 bits as bytes.

Sub-byte values are packed from the least significant bit up, across byte borders; value i takes the bits
i * bits … (i + 1) * bits - 1 of the byte string.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ground.bits import unpack_bits


@dataclass(frozen=True)
class DType:
    """One element type: the name in the format, bits stored, the numpy type of decoded values, the code in blobs.

    `blob_code` is None for types that a weight file cannot hold.
    """

    name: str
    bits: int
    numpy: np.dtype[Any]
    blob_code: int | None

    @property
    def kind(self) -> str:
        """`float`, `int`, `bool` or `string`."""
        return {"f": "float", "b": "bool", "U": "string"}.get(self.numpy.kind, "int")

    @property
    def signed(self) -> bool:
        """Whether stored values are two's complement (integers) or carry a sign (floats)."""
        return self.numpy.kind in "if"


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, np.dtype(np.bool_), None),
        DType("STRING", 0, np.dtype(np.str_), None),
        DType("FLOAT16", 16, np.dtype(np.float16), 1),
        DType("FLOAT32", 32, np.dtype(np.float32), 2),
        DType("UINT8", 8, np.dtype(np.uint8), 3),
        DType("INT8", 8, np.dtype(np.int8), 4),
        DType("INT16", 16, np.dtype(np.int16), 6),
        DType("UINT16", 16, np.dtype(np.uint16), 7),
        DType("INT4", 4, np.dtype(np.int8), 8),
        DType("UINT1", 1, np.dtype(np.uint8), 9),
        DType("UINT2", 2, np.dtype(np.uint8), 10),
        DType("UINT4", 4, np.dtype(np.uint8), 11),
        DType("UINT3", 3, np.dtype(np.uint8), 12),
        DType("UINT6", 6, np.dtype(np.uint8), 13),
        DType("INT32", 32, np.dtype(np.int32), 14),
        DType("UINT32", 32, np.dtype(np.uint32), 15),
    )
}
"""Types this package reads, by name; the codes in blobs are those of MIL's `BlobDataType`."""

ARRAY_TYPES = {"FLOAT16": 65552, "FLOAT32": 65568, "INT32": 131104, "INT8": 131080}
"""Types of tensors at the edge of a package, and their `ArrayFeatureType.ArrayDataType` in its description."""

LARGEST_FP16 = 65504.0
SMALLEST_NORMAL_FP16 = 2.0**-14


@dataclass(frozen=True)
class TensorType:
    """Element type and fixed shape of one value."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed values."""
        return -(-self.elements * self.dtype.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


def as_values(stored: NDArray[np.uint8], tensor: TensorType) -> NDArray[Any]:
    """Values in `tensor`'s shape from its `stored_bytes` bytes; a view where the type has whole bytes."""
    dtype = tensor.dtype
    if dtype.bits < 8:
        return unpack_bits(stored, dtype.bits, tensor.elements, dtype.signed).reshape(tensor.shape)
    return stored.view(dtype.numpy).reshape(tensor.shape)
