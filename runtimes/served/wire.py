# SPDX-License-Identifier: Apache-2.0
"""Tensors over a pipe, between this process and one that runs a model: a few bytes of frame around raw values.

Little-endian throughout. `text` is a u32 length and UTF-8; `tensor` is a text (its name), a u8 (index in DTYPES), a u8
rank, a u32 per dimension, and the values. A request is a u8 verb, a text (the model's key), and for

    OPEN   two texts: the model's file, and its weights (a file or a folder, "" for none)
    RUN    u32 count, tensors; u32 count, texts: the outputs wanted
    CLOSE  nothing; ABOUT nothing

A reply is a u8 status; FAILED is followed by a text, DONE by u32 count and tensors. `executorch_native/wire.cpp` is the
same in C++. This file also runs on the emulated CPU, so it needs nothing but numpy.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

OPEN, RUN, CLOSE, ABOUT = 1, 2, 3, 4
DONE, FAILED = 0, 1
DTYPES = ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")
MAX_TEXT_BYTES = 1 << 16
MAX_TENSORS = 1 << 12
MAX_RANK = 8
MAX_TENSOR_BYTES = 1 << 31


class Broken(Exception):
    """The other side sent something else than this protocol, or ended in the middle."""


def write_count(pipe: IO[bytes], value: int) -> None:
    """Writes a u32."""
    pipe.write(struct.pack("<I", value))


def read_count(pipe: IO[bytes], limit: int) -> int:
    """A u32. Raises Broken when it is over `limit`."""
    (value,) = struct.unpack("<I", read_exactly(pipe, 4))
    if value > limit:
        raise Broken(f"a count of {value}, the limit is {limit}")
    return int(value)


def write_text(pipe: IO[bytes], text: str) -> None:
    """Writes a text, cut at `MAX_TEXT_BYTES`."""
    data = text.encode()[:MAX_TEXT_BYTES]
    write_count(pipe, len(data))
    pipe.write(data)


def read_text(pipe: IO[bytes]) -> str:
    """A text."""
    return read_exactly(pipe, read_count(pipe, MAX_TEXT_BYTES)).decode(errors="replace")


def write_tensors(pipe: IO[bytes], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes a count and named tensors."""
    write_count(pipe, len(tensors))
    for name, tensor in tensors.items():
        write_text(pipe, name)
        pipe.write(struct.pack(f"<BB{tensor.ndim}I", DTYPES.index(tensor.dtype.name), tensor.ndim, *tensor.shape))
        pipe.write(np.ascontiguousarray(tensor).data.cast("B") if tensor.size else b"")


def read_tensors(pipe: IO[bytes]) -> dict[str, NDArray[Any]]:
    """Named tensors. Raises Broken for types, ranks and sizes that this protocol does not have."""
    return dict(_read_tensor(pipe) for _ in range(read_count(pipe, MAX_TENSORS)))


def _read_tensor(pipe: IO[bytes]) -> tuple[str, NDArray[Any]]:
    name = read_text(pipe)
    dtype_index, rank = read_exactly(pipe, 2)
    if dtype_index >= len(DTYPES) or rank > MAX_RANK:
        raise Broken(f"tensor {name} has type {dtype_index} and rank {rank}")
    shape = struct.unpack(f"<{rank}I", read_exactly(pipe, 4 * rank))
    dtype = np.dtype(DTYPES[dtype_index])
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension
    if size > MAX_TENSOR_BYTES:
        raise Broken(f"tensor {name} has shape {list(shape)}, {size} bytes; the limit is {MAX_TENSOR_BYTES}")
    return name, np.frombuffer(read_exactly(pipe, size), dtype=dtype).reshape(shape)


def write_texts(pipe: IO[bytes], texts: Sequence[str]) -> None:
    """Writes a count and texts."""
    write_count(pipe, len(texts))
    for text in texts:
        write_text(pipe, text)


def read_texts(pipe: IO[bytes]) -> list[str]:
    """Texts."""
    return [read_text(pipe) for _ in range(read_count(pipe, MAX_TENSORS))]


def read_exactly(pipe: IO[bytes], size: int) -> bytes:
    """`size` bytes. Raises Broken when the pipe ends before."""
    data = pipe.read(size)
    if len(data) != size:
        raise Broken(f"the pipe ended after {len(data)} of {size} bytes")
    return data
