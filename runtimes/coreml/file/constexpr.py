# SPDX-License-Identifier: Apache-2.0
"""Compressed constants made dense: every `constexpr_*` op of the iOS16 and the iOS18 format.

Values come out in the type of the scale or the table, rounded once, which is bit for bit what the format defines.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ground.bits import unpack_bits
from ....ground.errors import TurbopocketError
from .dtypes import TensorType

Array = NDArray[Any]
Decoder = Callable[..., tuple[Array, ...]]
_SLICE = 2**20
"""Indices looked up at a time: numpy turns them into 8-byte integers on the way."""


def decode(kind: str, values: Mapping[str, Array], types: Mapping[str, TensorType]) -> tuple[Array, ...]:
    """The op's results from its parameters and their types (sub-byte types are not visible in `values`).

    TurbopocketError for an unknown op, a missing or unknown parameter, or parameters that do not fit together.
    """
    required, optional, decoder = _form(kind, frozenset(values))
    if missing := required - set(values):
        raise TurbopocketError(f"{kind} has no {', '.join(sorted(missing))}")
    if unknown := set(values) - required - optional:
        raise TurbopocketError(f"{kind} has the unknown {', '.join(sorted(unknown))}")
    if kind in ("constexpr_lut_to_dense", "constexpr_lut_to_sparse") and "shape" not in values:
        indices = types["indices" if kind == "constexpr_lut_to_dense" else "indices_nonzero_data"]
        entries = types["lut"].shape[-2] if len(types["lut"].shape) > 2 else 0
        _require(entries == 2**indices.dtype.bits, f"{indices.dtype.name} indices and a table of {entries} entries")
    return decoder(**values)


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> tuple[Array, ...]:
    """scale * (quantized_data - zero_point); scale and zero point are scalars or run along `axis`."""
    at = _axis(axis, quantized_data.ndim)
    scales, zeros = np.broadcast_arrays(*(_along(vector, at, quantized_data.shape) for vector in (scale, zero_point)))
    return (_shift_scale(quantized_data, scales, zeros.astype(np.float32)),)


def cast(source_val: Array, output_dtype: Array) -> tuple[Array, ...]:
    """fp16 as fp32, the only cast that the format has."""
    _require(str(output_dtype) == "fp32" and source_val.dtype == np.float16, f"a cast to {output_dtype}")
    return (source_val.astype(np.float32),)


def packed_lut_to_dense(indices: Array, lut: Array, shape: Array) -> tuple[Array, ...]:
    """lut[index] in `shape`; the index bits are packed into the bytes `indices` (iOS16)."""
    bits = lut.size.bit_length() - 1
    _require(lut.ndim == 1 and lut.size in (2, 4, 16, 64, 256), f"a table of shape {list(lut.shape)}")
    out_shape, count = _shape(shape)
    _require(indices.ndim == 1 and indices.size == -(-count * bits // 8), f"{indices.size} bytes of {count} indices")
    return (_take(lut.reshape(-1, 1), unpack_bits(indices, bits, count)).reshape(out_shape),)


def packed_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array) -> tuple[Array, ...]:
    """`nonzero_data` where a bit of the bytes `mask` is set, else 0, in `shape` (iOS16)."""
    out_shape, count = _shape(shape)
    _require(mask.ndim == 1 and mask.size == -(-count // 8), f"{mask.size} mask bytes of {count} values")
    return sparse_to_dense(nonzero_data, unpack_bits(mask, 1, count).reshape(out_shape))


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> tuple[Array, ...]:
    """scale * (data - offset); scale and offset hold one value per equal block along every axis."""
    return (_shift_scale(data, scale, offset),)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> tuple[Array, ...]:
    """Table entries [*groups, entries, V] by index; the V values of an entry lie side by side along `vector_axis`."""
    rank = indices.ndim
    _require(rank >= 1 and lut.ndim == rank + 2, f"a table of rank {lut.ndim} for indices of rank {rank}")
    _require(_divides(lut.shape[:rank], indices.shape), f"{list(lut.shape[:rank])} tables for {list(indices.shape)}")
    groups, (entries, length) = lut.shape[:rank], lut.shape[-2:]
    _require(vector_axis is not None or length == 1, f"vectors of {length} without vector_axis")
    at = _axis(vector_axis, rank) if vector_axis is not None else rank - 1
    table = lut.reshape(-1, length)
    vectors = np.empty((*indices.shape, length), lut.dtype)
    # one table at a time: `indices` of a group are a rectangle, so no index is ever widened by its group's number
    for number, group in enumerate(np.ndindex(*groups)):
        block = tuple(
            slice(place * (size // count), (place + 1) * (size // count))
            for place, size, count in zip(group, indices.shape, groups, strict=True)
        )
        own = table[number * entries : (number + 1) * entries]
        vectors[block] = _take(own, indices[block])
    shape = list(indices.shape)
    shape[at] *= length
    return (np.moveaxis(vectors, -1, at + 1).reshape(shape),)


def sparse_to_dense(nonzero_data: Array, mask: Array) -> tuple[Array, ...]:
    """`nonzero_data` where `mask` is 1, else 0."""
    chosen = mask != 0
    _require(nonzero_data.ndim == 1 and nonzero_data.size == np.count_nonzero(chosen), "a mask of another size")
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[chosen] = nonzero_data
    return (dense,)


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, ...]:
    """Mask and values of what `lut_to_dense` gives where `indices_mask` is 1."""
    (indices,) = sparse_to_dense(indices_nonzero_data, indices_mask)
    (dense,) = lut_to_dense(indices, lut, vector_axis)
    length = lut.shape[-1]
    at = _axis(vector_axis, indices.ndim) if vector_axis is not None else indices.ndim - 1
    mask = np.repeat(indices_mask, length, axis=at)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, ...]:
    """Mask and values of what `blockwise_shift_scale` gives where `data_mask` is 1."""
    (data,) = sparse_to_dense(nonzero_data, data_mask)
    return data_mask, _shift_scale(data, scale, offset)[data_mask != 0]


def _form(kind: str, given: frozenset[str]) -> tuple[frozenset[str], frozenset[str], Decoder]:
    """Required and optional parameters and the decoder; an op of both formats is told apart by its `shape`."""
    forms = _FORMS.get(kind)
    if forms is None:
        raise TurbopocketError(f"{kind} is not known: known are {', '.join(sorted(_FORMS))}")
    required, optional, decoder = forms["shape" in given and len(forms) > 1]
    return frozenset(required.split()), frozenset(optional.split()), decoder


_FORMS: dict[str, tuple[tuple[str, str, Decoder], ...]] = {
    "constexpr_affine_dequantize": (("quantized_data zero_point scale axis", "", affine_dequantize),),
    "constexpr_cast": (("source_val output_dtype", "", cast),),
    "constexpr_lut_to_dense": (
        ("indices lut", "vector_axis", lut_to_dense),
        ("indices lut shape", "", packed_lut_to_dense),
    ),
    "constexpr_sparse_to_dense": (
        ("nonzero_data mask", "", sparse_to_dense),
        ("nonzero_data mask shape", "", packed_sparse_to_dense),
    ),
    "constexpr_blockwise_shift_scale": (("data scale", "offset", blockwise_shift_scale),),
    "constexpr_lut_to_sparse": (("indices_mask indices_nonzero_data lut", "vector_axis", lut_to_sparse),),
    "constexpr_sparse_blockwise_shift_scale": (
        ("data_mask nonzero_data scale", "offset", sparse_blockwise_shift_scale),
    ),
}
KINDS = frozenset(_FORMS)


def _shift_scale(data: Array, scale: Array, offset: Array | None) -> Array:
    _require(scale.dtype.kind == "f" and data.ndim == scale.ndim, f"a scale {scale.dtype} of rank {scale.ndim}")
    _require(_divides(scale.shape, data.shape), f"{list(scale.shape)} scales for {list(data.shape)} values")
    _require(offset is None or offset.shape == scale.shape, "an offset of another shape than the scale")
    split: list[int] = []
    for size, count in zip(data.shape, scale.shape, strict=True):
        split += [count, size // count]
    one_each = [size for count in scale.shape for size in (count, 1)]
    # integers of 8 bits times fp16 are exact in fp32: rounding once at the end is rounding in fp16
    wide = data.reshape(split).astype(np.float32)
    if offset is not None:
        wide -= offset.reshape(one_each).astype(np.float32)
        if "f" in (data.dtype.kind, offset.dtype.kind) and offset.dtype == scale.dtype:
            wide = wide.astype(scale.dtype).astype(np.float32)
    wide *= scale.reshape(one_each).astype(np.float32)
    if scale.dtype == np.float16:  # PyTorch rounds alike, in a tenth of the time of numpy 2.4
        import torch  # what only reads packages does without

        return torch.from_numpy(wide).half().numpy().reshape(data.shape)
    return wide.astype(scale.dtype, copy=False).reshape(data.shape)


def _take(table_EV: Array, indices: Array) -> Array:
    """Rows of the table by index, [*indices.shape, V] (the last axis also for V = 1)."""
    flat = np.ascontiguousarray(indices).reshape(-1)
    out = np.empty((flat.size, table_EV.shape[1]), table_EV.dtype)
    for start in range(0, flat.size, _SLICE):
        part = slice(start, start + _SLICE)
        np.take(table_EV, flat[part], axis=0, out=out[part], mode="clip")
    return out.reshape(*indices.shape, table_EV.shape[1])


def _along(vector: Array, axis: int, shape: tuple[int, ...]) -> Array:
    _require(vector.ndim == 0 or vector.shape == (shape[axis],), f"a vector of {vector.size} along {shape[axis]}")
    spread = [1] * len(shape)
    spread[axis] = vector.size
    return vector.reshape(spread)


def _axis(axis: Array, rank: int) -> int:
    _require(axis.size == 1 and -rank <= int(axis.reshape(-1)[0]) < rank, f"axis {axis} of rank {rank}")
    return int(axis.reshape(-1)[0]) % rank


def _shape(shape: Array) -> tuple[tuple[int, ...], int]:
    sizes = tuple(int(size) for size in shape.reshape(-1))
    count = 1
    for size in sizes:
        count *= size
    return sizes, count


def _divides(parts: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return all(part > 0 and size % part == 0 for part, size in zip(parts, sizes, strict=True))


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise TurbopocketError(f"a compressed value has {found}, which does not fit together")
