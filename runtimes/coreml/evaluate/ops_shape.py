# SPDX-License-Identifier: Apache-2.0
"""Ops that move numbers without changing them: shapes, slices, joins, look-ups."""

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .registry import op, require


@op("reshape", moves=True)
def reshape(run: Arithmetic, x: Tensor, shape: list[int]) -> Tensor:
    """-1 is what remains; 0 keeps the size at its place, where both have the same rank."""
    if 0 in shape and x.numel():
        require(len(shape) == x.dim(), f"shape {shape} with zeros for {list(x.shape)}")
        shape = [size or x.shape[axis] for axis, size in enumerate(shape)]
    return x.reshape(shape)


@op("transpose", moves=True)
def transpose(run: Arithmetic, x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@op("expand_dims", moves=True)
def expand_dims(run: Arithmetic, x: Tensor, axes: list[int]) -> Tensor:
    """New axes of size 1 at these places of the result."""
    rank = x.dim() + len(axes)
    places = _places(axes, rank)
    sizes = iter(x.shape)
    return x.reshape([1 if axis in places else next(sizes) for axis in range(rank)])


@op("squeeze", moves=True)
def squeeze(run: Arithmetic, x: Tensor, axes: list[int] | None = None) -> Tensor:
    places = [axis for axis, size in enumerate(x.shape) if size == 1] if axes is None else _places(axes, x.dim())
    require(all(x.shape[axis] == 1 for axis in places), f"axes {axes} of {list(x.shape)}, which are not of size 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in places])


@op("flatten2d", moves=True)
def flatten2d(run: Arithmetic, x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(x.shape[:axis].numel(), -1)


@op("concat", moves=True)
def concat(run: Arithmetic, values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if not interleave:
        return torch.cat(values, axis)
    require(all(value.shape == values[0].shape for value in values), "tensors of several shapes, interleaved")
    place = axis % values[0].dim()
    return torch.stack(values, place + 1).flatten(place, place + 1)


@op("stack", moves=True)
def stack(run: Arithmetic, values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@op("split", moves=True)
def split(
    run: Arithmetic, x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    size = x.shape[axis]
    if split_sizes is None:
        require(num_splits is not None and num_splits > 0, f"{num_splits} parts without split_sizes")
        count = num_splits or 1
        require(size % count == 0, f"{count} equal parts of {size}")
        split_sizes = [size // count] * count
    require(num_splits in (None, len(split_sizes)), f"{num_splits} parts with split_sizes {split_sizes}")
    require(len(split_sizes) == len(run.declared), f"{len(split_sizes)} parts, {len(run.declared)} declared")
    return tuple(x.split(split_sizes, axis))


@op("slice_by_index", moves=True)
def slice_by_index(
    run: Arithmetic,
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """x[begin:end:stride] per axis as Python slices; a masked end is left open, a squeezed axis is x[begin]."""
    rank = x.dim()
    strides = stride or [1] * rank
    masks = [mask or [False] * rank for mask in (begin_mask, end_mask, squeeze_mask)]
    lengths = {len(begin), len(end), len(strides), *map(len, masks)}
    require(lengths <= {rank} and 0 not in strides, f"{begin} to {end} of {list(x.shape)}")
    for axis in range(rank):
        low, high, step = begin[axis], end[axis], strides[axis]
        if masks[2][axis]:
            low = 0 if masks[0][axis] else low
            require(-x.shape[axis] <= low < x.shape[axis], f"index {low} of axis {axis} of {list(x.shape)}")
            x = x.narrow(axis, low % x.shape[axis], 1)
            continue
        places = range(x.shape[axis])[slice(None if masks[0][axis] else low, None if masks[1][axis] else high, step)]
        if step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, places.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x.reshape([size for axis, size in enumerate(x.shape) if not masks[2][axis]])


@op("slice_by_size", moves=True)
def slice_by_size(run: Arithmetic, x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """From `begin`, `size` numbers per axis; size -1 is all that follow."""
    require(len(begin) == len(size) == x.dim(), f"{begin} and {size} of {list(x.shape)}")
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        length = x.shape[axis]
        first = first + length if first < 0 else first
        count = length - first if count == -1 else count
        require(min(first, count) >= 0 and first + count <= length, f"{begin} and {size} of {list(x.shape)}")
        x = x.narrow(axis, first, count)
    return x


@op("tile", moves=True)
def tile(run: Arithmetic, x: Tensor, reps: list[int]) -> Tensor:
    require(len(reps) == x.dim() and all(count > 0 for count in reps), f"reps {reps} of {list(x.shape)}")
    run.expect([size * count for size, count in zip(x.shape, reps, strict=True)])
    return x.repeat(reps)


@op("reverse", moves=True)
def reverse(run: Arithmetic, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


@op("gather", moves=True)
def gather(
    run: Arithmetic, x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    require(-x.dim() <= axis < x.dim(), f"axis {axis} of {list(x.shape)}")
    place = axis % x.dim()
    require(0 <= batch_dims <= min(place, indices.dim()), f"batch_dims {batch_dims} before axis {place}")
    require(x.shape[:batch_dims] == indices.shape[:batch_dims], f"{list(indices.shape)} of {list(x.shape)} in batches")
    found = _indices(run, indices, x.shape[place])
    run.expect([*x.shape[:place], *indices.shape[batch_dims:], *x.shape[place + 1 :]])
    if batch_dims == 0:
        picked = x.index_select(place, found.reshape(-1))
        return picked.reshape(*x.shape[:place], *indices.shape, *x.shape[place + 1 :])
    batch = x.shape[:batch_dims]
    rows = [
        part.index_select(place - batch_dims, index.reshape(-1))
        for part, index in zip(
            x.reshape(-1, *x.shape[batch_dims:]), found.reshape(-1, *indices.shape[batch_dims:]), strict=True
        )
    ]
    middle = x.shape[batch_dims:place]
    return torch.stack(rows).reshape(*batch, *middle, *indices.shape[batch_dims:], *x.shape[place + 1 :])


@op("gather_along_axis", moves=True)
def gather_along_axis(
    run: Arithmetic, x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    return x.gather(axis, _indices(run, indices, x.shape[axis]))


@op("gather_nd", moves=True)
def gather_nd(
    run: Arithmetic, x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1] if indices.dim() else 0
    require(batch_dims == 0 and 0 < depth <= x.dim(), f"{list(indices.shape)} of {list(x.shape)}, {batch_dims} batches")
    places = tuple(_indices(run, indices[..., axis], x.shape[axis]) for axis in range(depth))
    run.expect([*indices.shape[:-1], *x.shape[depth:]])
    return x[places]


@op("pad", moves=True)
def pad(
    run: Arithmetic,
    x: Tensor,
    pad: list[int],
    mode: str = "constant",
    constant_val: float = 0.0,
) -> Tensor:
    """(before, after) for each of the last axes that `pad` speaks of."""
    axes = len(pad) // 2
    require(len(pad) % 2 == 0 and axes <= x.dim() and min(pad, default=0) >= 0, f"pad {pad} of {list(x.shape)}")
    pairs = [(0, 0)] * (x.dim() - axes) + list(zip(pad[0::2], pad[1::2], strict=True))
    run.expect([size + low + high for size, (low, high) in zip(x.shape, pairs, strict=True)])
    if mode == "constant":
        return torch.nn.functional.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=constant_val)
    require(mode in ("reflect", "replicate"), f"mode {mode!r}: known are constant, reflect, replicate")
    for axis, (low, high) in enumerate(pairs):
        last = x.shape[axis] - 1
        places = torch.arange(-low, last + high + 1)
        if mode == "reflect":
            require(max(low, high) <= last, f"pad {pad} of {list(x.shape)}, which is too narrow to reflect")
            places = last - (last - places.abs()).abs()
        x = x.index_select(axis, places.clamp(0, last)) if low or high else x
    return x


@op("fill", moves=True)
def fill(run: Arithmetic, shape: list[int], value: Tensor) -> Tensor:
    run.expect(shape)
    return value.reshape([1] * len(shape)).expand(shape)


@op("fill_like", moves=True)
def fill_like(run: Arithmetic, ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.reshape([1] * ref_tensor.dim()).expand(ref_tensor.shape)


@op("shape", moves=True)
def shape(run: Arithmetic, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=torch.int32)


@op("one_hot")
def one_hot(
    run: Arithmetic, indices: Tensor, one_hot_vector_size: int, on_value: Tensor, off_value: Tensor, axis: int = -1
) -> Tensor:
    place = axis % (indices.dim() + 1)
    run.expect([*indices.shape[:place], one_hot_vector_size, *indices.shape[place:]])
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    return torch.where(hot, on_value, off_value).movedim(-1, place)


@op("cumsum")
def cumsum(run: Arithmetic, x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    ordered = x.flip(axis) if reverse else x
    total = ordered.cumsum(axis).to(x.dtype)
    total = total - ordered if exclusive else total
    return total.flip(axis) if reverse else total


@op("band_part", moves=True)
def band_part(run: Arithmetic, x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """The band of `lower` diagonals below and `upper` above the main one (-1: all of them), else 0."""
    kept = x if lower < 0 else x.triu(-lower)
    return kept if upper < 0 else kept.tril(upper)


def _indices(run: Arithmetic, indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front as int64; one outside the axis is refused, whatever `validate_indices` says."""
    found = indices.to(torch.int64)
    if run.from_end:
        found = torch.where(found < 0, found + size, found)
    require(bool(((found >= 0) & (found < size)).all()), f"an index outside 0 to {size - 1}")
    return found


def _places(axes: list[int], rank: int) -> list[int]:
    places = [axis % rank for axis in axes if -rank <= axis < rank]
    require(len(set(places)) == len(axes), f"axes {axes} of rank {rank}")
    return places
