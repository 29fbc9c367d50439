# SPDX-License-Identifier: Apache-2.0
"""Every compressed form decodes to what a plain loop over the format's definition gives, bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.bits import unpack_bits
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.coreml.file import constexpr
from turbopocket.runtimes.coreml.file.dtypes import DTYPES, TensorType
from turbopocket.runtimes.coreml.file.program import Program

from .conftest import MODEL_PATH, WEIGHTS_PATH, Written, coremltools_module, pack_bits, weights, written_sum

RNG = np.random.default_rng(3)


def integers(bits: int, shape: tuple[int, ...], signed: bool = False) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    return RNG.integers(low, low + 2**bits, shape).astype(np.int8 if signed else np.uint8)


def floats(dtype: Any, *shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def stored_and_read(
    tmp_path: Path,
    kind: str,
    outputs: dict[str, tuple[str, tuple[int, ...]]],
    inputs: dict[str, Any],
    older: bool = False,
) -> list[np.ndarray]:
    """The op's results as read from a package in which it stands with its inputs in the weight file."""
    written = Written()
    values = {
        name: written.blob(dtype, np.asarray(value)) if dtype not in ("STRING", "INLINE") else
        written.inline("STRING" if dtype == "STRING" else "INT32", value)
        for name, (dtype, value) in inputs.items()
    }  # fmt: skip
    written.op(kind, outputs, {} if older else values, values if older else None)
    written.op("identity", {"y": ("FLOAT32", (1,))}, {"x": "x"})
    written.ends({"x": (1,)}, {"y": (1,)})
    program = Program.open(written.save(tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}.mlpackage"))
    read = weights(program)
    assert list(read) == list(outputs)
    return [read[name] for name in outputs]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [1, 5, 8, 31, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_come_out_as_they_went_in(bits: int, count: int, signed: bool) -> None:
    values = integers(bits, (count,), signed)
    packed = np.frombuffer(pack_bits(values, bits), np.uint8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count, signed), values)


def looped_lut(indices: np.ndarray, lut: np.ndarray, axis: int | None) -> np.ndarray:
    rank, length = indices.ndim, lut.shape[-1]
    shape = list(indices.shape)
    if axis is not None:
        shape[axis] *= length
    dense = np.empty(shape, lut.dtype)
    for place in itertools.product(*map(range, indices.shape)):
        group = tuple(place[k] * lut.shape[k] // indices.shape[k] for k in range(rank))
        for part in range(length):
            target = list(place)
            if axis is not None:
                target[axis] = place[axis] * length + part
            dense[tuple(target)] = lut[(*group, indices[place], part)]
    return dense


def looped_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    dense = np.empty(data.shape, scale.dtype)
    for place in itertools.product(*map(range, data.shape)):
        block = tuple(place[k] * scale.shape[k] // data.shape[k] for k in range(data.ndim))
        value = scale.dtype.type(data[place])
        if offset is not None:
            value = scale.dtype.type(value - scale.dtype.type(offset[block]))
        dense[place] = scale.dtype.type(scale[block] * value)
    return dense


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("shape", "groups", "length", "axis"),
    [
        ((6, 8), (1, 1), 1, None),
        ((6, 8), (3, 1), 1, None),
        ((6, 8), (2, 4), 1, 0),
        ((6, 8), (1, 1), 4, 1),
        ((6, 8), (2, 1), 2, 0),
        ((6, 8), (3, 2), 2, -1),
        ((4, 2, 3, 3), (2, 1, 1, 1), 2, 1),
        ((4, 2, 3, 3), (1, 1, 3, 3), 1, None),
        ((4, 2, 1, 1), (4, 1, 1, 1), 3, 0),
    ],
)
def test_tables(
    tmp_path: Path,
    dtype: Any,
    bits: int,
    shape: tuple[int, ...],
    groups: tuple[int, ...],
    length: int,
    axis: int | None,
) -> None:
    indices, lut = integers(bits, shape), floats(dtype, *groups, 2**bits, length)
    expected = looped_lut(indices, lut, axis if length > 1 else None)
    name = np.dtype(dtype).name.upper()
    inputs = {"indices": (f"UINT{bits}", indices), "lut": (name, lut)}
    if axis is not None:
        inputs["vector_axis"] = ("INLINE", axis)
    (found,) = stored_and_read(tmp_path, "constexpr_lut_to_dense", {"w": (name, expected.shape)}, inputs)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("stored", ["INT4", "UINT4", "INT8", "UINT8", "FLOAT16"])
@pytest.mark.parametrize("offset", [None, "same", "float"])
@pytest.mark.parametrize(
    ("shape", "blocks"), [((6, 8), (6, 1)), ((6, 8), (3, 4)), ((6, 8), (1, 1)), ((4, 6, 3, 3), (4, 2, 1, 1))]
)
def test_scales(
    tmp_path: Path, scale_dtype: Any, stored: str, offset: str | None, shape: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    kind, name = DTYPES[stored], np.dtype(scale_dtype).name.upper()
    if kind.kind == "float":
        data, zero = floats(kind.numpy, *shape), floats(kind.numpy, *blocks)
    else:
        data, zero = integers(kind.bits, shape, kind.signed), integers(kind.bits, blocks, kind.signed)
    scale = floats(scale_dtype, *blocks)
    inputs = {"data": (stored, data), "scale": (name, scale)}
    offsets = {None: None, "same": zero, "float": floats(scale_dtype, *blocks)}[offset]
    if offsets is not None:
        inputs["offset"] = (stored if offset == "same" else name, offsets)
    (found,) = stored_and_read(tmp_path, "constexpr_blockwise_shift_scale", {"w": (name, shape)}, inputs)
    np.testing.assert_array_equal(found, looped_scale(data, scale, offsets))


@pytest.mark.parametrize(("axis", "length", "groups"), [(None, 1, (1, 1)), (0, 2, (2, 1)), (1, 4, (1, 2))])
def test_sparse_tables_and_scales(tmp_path: Path, axis: int | None, length: int, groups: tuple[int, int]) -> None:
    mask = RNG.integers(0, 2, (6, 8)).astype(np.uint8)
    indices, lut = integers(4, (6, 8)), floats(np.float16, *groups, 16, length)
    dense = looped_lut(indices, lut, axis)
    wide = mask if axis is None else np.repeat(mask, length, axis)
    inputs = {
        "indices_mask": ("UINT1", mask),
        "indices_nonzero_data": ("UINT4", indices[mask != 0]),
        "lut": ("FLOAT16", lut),
    }
    if axis is not None:
        inputs["vector_axis"] = ("INLINE", axis)
    kept = dense[wide != 0]
    outputs = {"m": ("UINT1", wide.shape), "w": ("FLOAT16", kept.shape)}
    found_mask, found = stored_and_read(tmp_path, "constexpr_lut_to_sparse", outputs, inputs)
    np.testing.assert_array_equal(found_mask, wide)
    np.testing.assert_array_equal(found, kept)

    data, scale = integers(8, (6, 8), signed=True), floats(np.float16, 6, 2)
    zero = integers(8, (6, 2), signed=True)
    inputs = {
        "data_mask": ("UINT1", mask),
        "nonzero_data": ("INT8", data[mask != 0]),
        "scale": ("FLOAT16", scale),
        "offset": ("INT8", zero),
    }
    kept = looped_scale(data, scale, zero)[mask != 0]
    outputs = {"m": ("UINT1", (6, 8)), "w": ("FLOAT16", kept.shape)}
    found_mask, found = stored_and_read(tmp_path, "constexpr_sparse_blockwise_shift_scale", outputs, inputs)
    np.testing.assert_array_equal(found_mask, mask)
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("stored", ["INT4", "UINT8", "FLOAT16"])
def test_sparse(tmp_path: Path, stored: str) -> None:
    mask = RNG.integers(0, 2, (3, 5, 2)).astype(np.uint8)
    values = RNG.integers(0, 7, mask.sum()).astype(DTYPES[stored].numpy)
    inputs = {"nonzero_data": (stored, values), "mask": ("UINT1", mask)}
    (found,) = stored_and_read(tmp_path, "constexpr_sparse_to_dense", {"w": (stored, mask.shape)}, inputs)
    left = iter(values)
    expected = [next(left) if bit else 0 for bit in mask.reshape(-1)]
    np.testing.assert_array_equal(found.reshape(-1), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_older_tables_are_packed_in_bytes(tmp_path: Path, bits: int) -> None:
    indices, lut = integers(bits, (5, 7)), floats(np.float16, 2**bits)
    packed = np.frombuffer(pack_bits(indices, bits), np.uint8)
    inputs = {
        "indices": ("UINT8", packed),
        "lut": ("FLOAT16", lut),
        "shape": ("UINT32", np.array([5, 7], np.uint32)),
    }
    (found,) = stored_and_read(tmp_path, "constexpr_lut_to_dense", {"w": ("FLOAT16", (5, 7))}, inputs, older=True)
    np.testing.assert_array_equal(found, [[lut[index] for index in row] for row in indices])


def test_older_sparse_and_cast(tmp_path: Path) -> None:
    mask, source = RNG.integers(0, 2, (5, 7)).astype(np.uint8), floats(np.float16, 3)
    values = floats(np.float32, int(mask.sum()))
    inputs = {
        "nonzero_data": ("FLOAT32", values),
        "mask": ("UINT8", np.frombuffer(pack_bits(mask, 1), np.uint8)),
        "shape": ("UINT32", np.array([5, 7], np.uint32)),
    }
    (found,) = stored_and_read(tmp_path, "constexpr_sparse_to_dense", {"w": ("FLOAT32", (5, 7))}, inputs, older=True)
    left = iter(values)
    np.testing.assert_array_equal(found, [[next(left) if bit else 0 for bit in row] for row in mask])
    inputs = {"source_val": ("FLOAT16", source), "output_dtype": ("STRING", "fp32")}
    (found,) = stored_and_read(tmp_path, "constexpr_cast", {"w": ("FLOAT32", (3,))}, inputs, older=True)
    np.testing.assert_array_equal(found, source.astype(np.float32))


@pytest.mark.parametrize("stored", ["UINT8", "INT8"])
@pytest.mark.parametrize(("scales", "zeros"), [((), ()), ((3,), (3,)), ((3,), ())])
def test_older_scales_run_along_one_axis(
    tmp_path: Path, stored: str, scales: tuple[int, ...], zeros: tuple[int, ...]
) -> None:
    data = integers(8, (2, 3, 4), stored == "INT8")
    scale, zero = floats(np.float16, *scales), integers(8, zeros, stored == "INT8")
    inputs = {
        "quantized_data": (stored, data),
        "scale": ("FLOAT16", scale),
        "zero_point": (stored, zero),
        "axis": ("INLINE", -2),
    }
    outputs = {"w": ("FLOAT16", (2, 3, 4))}
    (found,) = stored_and_read(tmp_path, "constexpr_affine_dequantize", outputs, inputs, older=True)
    for place in itertools.product(range(2), range(3), range(4)):
        of_axis = [array[place[1]] if array.ndim else array[()] for array in (scale, zero)]
        assert found[place] == np.float16(np.float32(of_axis[0]) * (int(data[place]) - int(of_axis[1])))


def test_coremltools_decodes_the_same(tmp_path: Path) -> None:
    """A second reader of the definition: coremltools' own decoder of a vector table and of block scales."""
    ops = coremltools_module("converters.mil.mil.ops.defs.iOS18.compression")
    indices, lut = integers(6, (8, 4, 3, 3)), floats(np.float16, 4, 2, 1, 1, 64, 2)
    types = {"indices": TensorType(DTYPES["UINT6"], indices.shape), "lut": TensorType(DTYPES["FLOAT16"], lut.shape)}
    values = {"indices": indices, "lut": lut, "vector_axis": np.array(1)}
    (found,) = constexpr.decode("constexpr_lut_to_dense", values, types)
    np.testing.assert_array_equal(found, ops.constexpr_lut_to_dense.decompress(indices, lut, np.int32(1)))
    data, scale, zero = integers(4, (8, 32), True), floats(np.float16, 8, 4), integers(4, (8, 4), True)
    (found,) = constexpr.blockwise_shift_scale(data, scale, zero)
    np.testing.assert_array_equal(found, ops.constexpr_blockwise_shift_scale.decompress(data, scale, zero))


def test_a_value_compressed_twice_is_decoded_twice(tmp_path: Path) -> None:
    written = Written()
    indices, table = integers(2, (4, 4)), integers(8, (1, 1, 4, 1), signed=True)
    scale = floats(np.float32, 4, 1)
    written.op(
        "constexpr_lut_to_dense",
        {"inner": ("INT8", (4, 4))},
        {"indices": written.blob("UINT2", indices), "lut": written.blob("INT8", table)},
    )
    written.op(
        "constexpr_blockwise_shift_scale",
        {"w": ("FLOAT32", (4, 4))},
        {"data": "inner", "scale": written.blob("FLOAT32", scale)},
    )
    written.op("identity", {"y": ("FLOAT32", (1,))}, {"x": "x"})
    written.ends({"x": (1,)}, {"y": (1,)})
    program = Program.open(written.save(tmp_path / "twice.mlpackage"))
    np.testing.assert_array_equal(program.constant("w"), looped_lut(indices, table, None).astype(np.float32) * scale)


def test_one_flipped_index_bit_changes_exactly_one_vector(tmp_path: Path) -> None:
    indices, lut = integers(4, (8, 8)), floats(np.float16, 1, 1, 16, 4)
    written = Written()
    written.op(
        "constexpr_lut_to_dense",
        {"w": ("FLOAT16", (8, 32))},
        {
            "indices": written.blob("UINT4", indices),
            "lut": written.blob("FLOAT16", lut),
            "vector_axis": written.inline("INT32", 1),
        },
    )
    written.op("identity", {"y": ("FLOAT32", (1,))}, {"x": "x"})
    written.ends({"x": (1,)}, {"y": (1,)})
    package = written.save(tmp_path / "flip.mlpackage")
    before = Program.open(package).constant("w").copy()
    file = package / WEIGHTS_PATH
    content = bytearray(file.read_bytes())
    content[128 + 5] ^= 0x10  # the first blob's bytes begin at 128; the high nibble of byte 5 is index 11
    file.write_bytes(content)
    changed = Program.open(package).constant("w") != before
    assert changed.sum() == 4
    assert changed[1, 12:16].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lut": floats(np.float32, 1, 1, 2, 1)}, "a table of 2 entries"),
        ({"lut": floats(np.float32, 1, 5, 4, 1)}, r"\[1, 5\] tables for \[2, 3\]"),
        ({"lut": floats(np.float32, 1, 1, 4, 2)}, "vectors of 2 without vector_axis"),
        ({"vector_axis": np.array(2)}, "axis 2 of rank 2"),
        ({"extra": np.array(2)}, "the unknown extra"),
        ({"indices": integers(2, (3,))}, "a table of rank 4 for indices of rank 1"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    values = {"indices": integers(2, (2, 3)), "lut": floats(np.float32, 1, 1, 4, 1)} | change
    types = {
        "indices": TensorType(DTYPES["UINT2"], values["indices"].shape),
        "lut": TensorType(DTYPES["FLOAT32"], values["lut"].shape),
    }
    with pytest.raises(TurbopocketError, match=message):
        constexpr.decode("constexpr_lut_to_dense", values, types)


def test_missing_parameter_and_unknown_form_are_refused() -> None:
    with pytest.raises(TurbopocketError, match="constexpr_lut_to_dense has no lut"):
        constexpr.decode("constexpr_lut_to_dense", {"indices": integers(2, (2,))}, {})
    with pytest.raises(TurbopocketError, match="constexpr_magic is not known"):
        constexpr.decode("constexpr_magic", {}, {})


def test_a_text_among_the_numbers_is_refused_by_name(tmp_path: Path) -> None:
    written = Written()
    data, scale = written.inline("STRING", "abc"), written.inline("FLOAT32", 1.0)
    written.op("constexpr_blockwise_shift_scale", {"w": ("FLOAT32", ())}, {"data": data, "scale": scale})
    written.op("identity", {"y": ("FLOAT32", (1,))}, {"x": "x"})
    written.ends({"x": (1,)}, {"y": (1,)})
    program = Program.open(written.save(tmp_path / "text.mlpackage"))
    with pytest.raises(TurbopocketError, match="op constexpr_blockwise_shift_scale w: could not convert string"):
        program.constant("w")


def test_declared_type_must_be_what_decoding_gives(tmp_path: Path) -> None:
    package = written_sum().save(tmp_path / "wrong.mlpackage")
    model = (package / MODEL_PATH).read_bytes()
    assert Program.open(package).constant("v").shape == (2, 3)
    written = written_sum()
    written.block.operations[1].outputs[0].type.CopyFrom(written.type("FLOAT32", (3, 2)))
    (package / MODEL_PATH).write_bytes(written.model.SerializeToString())
    assert model != (package / MODEL_PATH).read_bytes()
    with pytest.raises(TurbopocketError, match=r"v is declared FLOAT32 \[3, 2\], decoded float32 \[2, 3\]"):
        Program.open(package).constant("v")
