# SPDX-License-Identifier: Apache-2.0
"""Tensors survive the pipe; whatever else comes out of it is refused before memory is asked for."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from turbopocket.runtimes.served import wire

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)
# no subnormal numbers: a library that another test has loaded may have set this process to flush them to zero
TENSORS = st.one_of(
    [arrays.arrays(np.dtype(name), SHAPES, elements={"allow_subnormal": False}) for name in wire.DTYPES]
)


@given(st.dictionaries(st.text(max_size=8), TENSORS, max_size=4), st.lists(st.text(max_size=8), max_size=4))
def test_tensors_and_texts_come_out_as_they_went_in(tensors: dict[str, np.ndarray], texts: list[str]) -> None:
    pipe = io.BytesIO()
    wire.write_tensors(pipe, tensors)
    wire.write_texts(pipe, texts)
    pipe.seek(0)
    found = wire.read_tensors(pipe)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    assert wire.read_texts(pipe) == texts


def test_transposed_tensor_is_sent_in_row_order() -> None:
    pipe = io.BytesIO()
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    wire.write_tensors(pipe, {"x": matrix.T})
    pipe.seek(0)
    np.testing.assert_array_equal(wire.read_tensors(pipe)["x"], matrix.T)


def tensor_head(dtype: int, shape: list[int]) -> bytes:
    name = struct.pack("<I", 1) + b"x"
    return struct.pack("<I", 1) + name + bytes([dtype, len(shape)]) + struct.pack(f"<{len(shape)}I", *shape)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x01", "ended after 1 of 4 bytes"),
        (struct.pack("<I", 1 << 30), "a count of 1073741824, the limit is 4096"),
        (tensor_head(9, []), "tensor x has type 9 and rank 0"),
        (tensor_head(0, [1] * 9), "tensor x has type 0 and rank 9"),
        (tensor_head(0, [1 << 20, 1 << 20]), r"tensor x has shape \[1048576, 1048576\], 4398046511104 bytes"),
        (tensor_head(0, [4]) + b"\0" * 15, "ended after 15 of 16 bytes"),
    ],
)
def test_damaged_message_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(wire.Broken, match=message):
        wire.read_tensors(io.BytesIO(data))
