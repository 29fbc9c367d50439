# SPDX-License-Identifier: Apache-2.0
"""Checks a safetensors file by its header alone: a bad file of gigabytes is refused in milliseconds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...ground.reading import parse_json

HEADER_SIZE_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MOST_TENSORS = 100_000
"""In one file: SDXL whole has 2,640, and a LoRA of all its layers at most four for each."""
MOST_LETTERS = 1000
"""Of a tensor's name, which is looked up by patterns; published ones have at most 120."""
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored, and as what; `dtype` is safetensors' name, such as 'F16'.

    `steps` are done to the stored values, in order, to have the tensor (a part of them, or transposed); `shape`
    is the tensor's, after them.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    steps: tuple[Callable[[Any], Any], ...] = ()


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors that a safetensors file holds, by name, without reading their values.

    Raises TurbopocketError when the file is not safetensors, is a Git LFS pointer, is truncated, or has bytes
    that no tensor owns.
    """
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Returns what `read_header` does, and the texts that its writer put beside it; raises as that does."""
    if not file.is_file():
        raise TurbopocketError(f"{file} is not a plain file, which weights are read from")
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(HEADER_SIZE_BYTES)
        if start == b"version ":
            raise TurbopocketError(f"{file} is a Git LFS pointer, not weights", hint="fetch it: git lfs pull")
        header_bytes = int.from_bytes(start, "little")
        if size_bytes < HEADER_SIZE_BYTES or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise TurbopocketError(f"{file} is not a safetensors file ({size_bytes} bytes)")
        data_start = HEADER_SIZE_BYTES + header_bytes
        if size_bytes < data_start:
            raise _truncated(file, size_bytes, data_start, "its header alone")
        header = _parse_header(file, stream.read(header_bytes))
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored_tensor(file, name, entry) for name, entry in header.items()}
    end = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size_bytes < end:
        raise _truncated(file, size_bytes, end, "its header")
    if size_bytes > end:
        raise TurbopocketError(f"{file} has {size_bytes - end} bytes after its last tensor, none are allowed")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _truncated(file: Path, size_bytes: int, needed_bytes: int, needed_by: str) -> TurbopocketError:
    return TurbopocketError(
        f"{file} is truncated: {size_bytes} bytes found, {needed_bytes} needed by {needed_by}, "
        f"{needed_bytes - size_bytes} bytes missing",
        hint="download or copy the file again",
    )


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    header = parse_json(text, f"{file} is not a safetensors file: its header")
    if not isinstance(header, dict):
        raise TurbopocketError(f"{file} is not a safetensors file: its header is not a JSON object")
    if len(header) > MOST_TENSORS:
        raise TurbopocketError(f"{file} holds {len(header):,} tensors; at most {MOST_TENSORS:,} are read")
    if too_long := next((name for name in header if len(name) > MOST_LETTERS), None):
        raise TurbopocketError(
            f"{file}: the name {too_long[:80]!r}… has {len(too_long):,} letters; at most {MOST_LETTERS:,} are read"
        )
    return header


def _stored_tensor(file: Path, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _bad_entry(file, name) from None
    if not isinstance(dtype, str) or not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise _bad_entry(file, name)
    if dtype in ITEM_BYTES and end - begin != (needed_bytes := math.prod(shape) * ITEM_BYTES[dtype]):
        raise TurbopocketError(
            f"{file}: {name} takes {end - begin} bytes, its shape {list(shape)} in {dtype} needs {needed_bytes}"
        )
    return StoredTensor(file, name, dtype, shape)


def _bad_entry(file: Path, name: str) -> TurbopocketError:
    return TurbopocketError(f"{file} is not a safetensors file: bad header entry of {name!r}")
