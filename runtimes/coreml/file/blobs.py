# SPDX-License-Identifier: Apache-2.0
"""Weight files of ML programs: a 64-byte file header, then per blob a header and its bytes; mapped, not read."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ground.errors import TurbopocketError
from .dtypes import DTYPES, TensorType, as_values

ALIGNMENT = 64
"""Offsets of headers and of values are multiples of this."""
FILE_HEADER = struct.Struct("<II56x")
"""Number of blobs, version."""
BLOB_HEADER = struct.Struct("<IIQQQ32x")
"""Sentinel, code of the type, bytes of values, their offset, unused bits at their end."""
VERSION = 2
SENTINEL = 0xDEADBEEF
_NAMES = {dtype.blob_code: dtype.name for dtype in DTYPES.values() if dtype.blob_code is not None}


@dataclass(frozen=True)
class Blob:
    """One blob's header: where it stands, the code of its type, where its bytes begin, how many, unused last bits."""

    offset: int
    code: int
    data: int
    bytes: int
    padding_bits: int

    @property
    def end(self) -> int:
        """Offset behind the last byte."""
        return self.data + self.bytes


class BlobFile:
    """A mapped weight file. TurbopocketError when it is missing, too short or of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_symlink() or not path.is_file():
            raise TurbopocketError(f"{path} is missing", hint="the weight file belongs to the package: copy it whole")
        if path.stat().st_size < ALIGNMENT:
            raise TurbopocketError(f"{path} has {path.stat().st_size} bytes, a weight file has at least {ALIGNMENT}")
        # copy-on-write pages count as writable, which PyTorch asks for; nothing ever writes to them
        self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="c")
        self.count, version = FILE_HEADER.unpack(self._bytes[: FILE_HEADER.size].tobytes())
        if version != VERSION:
            raise TurbopocketError(f"{path} is a weight file of version {version}: this version reads {VERSION}")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._bytes.size

    def blob(self, offset: int) -> Blob:
        """The header at `offset`; TurbopocketError when none stands there or its bytes leave the file."""
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= self.size - BLOB_HEADER.size:
            raise TurbopocketError(
                f"{self.path} has no blob at {offset}: it ends at {self.size}, blobs start at n * 64"
            )
        header = self._bytes[offset : offset + BLOB_HEADER.size].tobytes()
        sentinel, code, length, data, padding_bits = BLOB_HEADER.unpack(header)
        if sentinel != SENTINEL:
            raise TurbopocketError(
                f"{self.path} has no blob at {offset}: found {sentinel:#x}, a blob begins {SENTINEL:#x}"
            )
        blob = Blob(offset, code, data, length, padding_bits)
        if data % ALIGNMENT or data < offset + ALIGNMENT or blob.end > self.size:
            raise TurbopocketError(f"{self.path}: the blob at {offset} has bytes {data} to {blob.end} of {self.size}")
        return blob

    def check(self, offset: int, tensor: TensorType) -> None:
        """Returns when the blob at `offset` holds exactly a `tensor`; TurbopocketError says what it holds instead."""
        blob = self.blob(offset)
        wanted = tensor.stored_bytes
        padding_bits = wanted * 8 - tensor.elements * tensor.dtype.bits
        if blob.code != tensor.dtype.blob_code or blob.bytes != wanted or blob.padding_bits != padding_bits:
            found = _NAMES.get(blob.code, f"type {blob.code}")
            raise TurbopocketError(
                f"{self.path}: blob {offset} holds {found} in {blob.bytes} bytes, {blob.padding_bits} bits idle; "
                f"the program expects {tensor} in {wanted} bytes, {padding_bits} bits idle"
            )

    def blobs(self) -> list[Blob]:
        """Every blob in file order; TurbopocketError when the file is not exactly as many as its header says."""
        found: list[Blob] = []
        offset = ALIGNMENT
        for _ in range(min(self.count, self.size // ALIGNMENT)):
            found.append(self.blob(offset))
            offset = -(-found[-1].end // ALIGNMENT) * ALIGNMENT
        if len(found) != self.count or not offset - ALIGNMENT < self.size <= offset:
            raise TurbopocketError(
                f"{self.path} announces {self.count} blobs; the {len(found)} there end at {offset} of {self.size} bytes"
            )
        return found

    def read(self, offset: int, tensor: TensorType) -> NDArray[Any]:
        """The values of the blob, which `check` has passed; a view of the file where the type has whole bytes."""
        data = self.blob(offset).data
        return as_values(self._bytes[data : data + tensor.stored_bytes], tensor)
