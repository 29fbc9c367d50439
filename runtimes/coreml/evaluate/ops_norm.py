# SPDX-License-Identifier: Apache-2.0
"""Ops that add up along axes: reductions, softmax, normalisations."""

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .ops_linear import softmax_along
from .registry import op, require


@op("reduce_sum")
def reduce_sum(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _as_given(run.sum(x, _axes(axes, x), keep_dims), x)


@op("reduce_mean")
def reduce_mean(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    require(x.is_floating_point(), "a mean of integers, which the format leaves open")
    return run.mean(x, _axes(axes, x), keep_dims)


@op("reduce_max")
def reduce_max(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(axes, x), keep_dims)


@op("reduce_min")
def reduce_min(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amin(_axes(axes, x), keep_dims)


@op("reduce_sum_square")
def reduce_sum_square(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _as_given(run.sum(run.step(x * x), _axes(axes, x), keep_dims), x)


@op("reduce_l1_norm")
def reduce_l1_norm(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _as_given(run.sum(x.abs(), _axes(axes, x), keep_dims), x)


@op("reduce_l2_norm")
def reduce_l2_norm(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return torch.sqrt(run.sum(run.step(x * x), _axes(axes, x), keep_dims))


@op("reduce_log_sum_exp")
def reduce_log_sum_exp(run: Arithmetic, x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return torch.logsumexp(x, _axes(axes, x), keep_dims)


@op("reduce_argmax")
def reduce_argmax(
    run: Arithmetic, x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return _first(x, x.amax(axis, keepdim=True), axis, keep_dims)


@op("reduce_argmin")
def reduce_argmin(
    run: Arithmetic, x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return _first(x, x.amin(axis, keepdim=True), axis, keep_dims)


@op("softmax")
def softmax(run: Arithmetic, x: Tensor, axis: int = -1) -> Tensor:
    return softmax_along(run, x, axis)


@op("layer_norm")
def layer_norm(
    run: Arithmetic,
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    over = _axes(axes, x)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    y = _normalised(run, x, over, epsilon)
    return _scaled(run, y, *(None if item is None else item.reshape(shape) for item in (gamma, beta)))


@op("instance_norm")
def instance_norm(
    run: Arithmetic, x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    y = _normalised(run, x, list(range(2, x.dim())), epsilon)
    return _scaled(run, y, *(None if item is None else _per_channel(item, x) for item in (gamma, beta)))


@op("batch_norm")
def batch_norm(
    run: Arithmetic,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    # constants only: a compiler folds them into one factor and one addend per channel
    factor = torch.rsqrt(variance.double() + epsilon) * (1.0 if gamma is None else gamma.double())
    addend = -mean.double() * factor + (0.0 if beta is None else beta.double())
    scaled = run.step(x * run.step(_per_channel(factor.float(), x)))
    return scaled + run.step(_per_channel(addend.float(), x))


@op("l2_norm")
def l2_norm(run: Arithmetic, x: Tensor, epsilon: float = 1e-6) -> Tensor:
    require(x.dim() >= 3, f"x {list(x.shape)}: the last three axes are normalised together")
    squares = run.sum(run.step(x * x), [x.dim() - 3, x.dim() - 2, x.dim() - 1])
    return x / torch.sqrt(squares + epsilon)


def _normalised(run: Arithmetic, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    distance = run.step(x - run.step(run.mean(x, axes)))
    variance = run.step(run.mean(run.step(distance * distance), axes))
    return distance / run.step(torch.sqrt(run.step(variance + epsilon)))


def _scaled(run: Arithmetic, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    scaled = x if gamma is None else run.step(x) * gamma
    return scaled if beta is None else run.step(scaled) + beta


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    require(
        x.dim() >= 2 and list(vector.shape) == [x.shape[1]], f"{list(vector.shape)} for channels of {list(x.shape)}"
    )
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def _first(x: Tensor, extreme: Tensor, axis: int, keep_dims: bool) -> Tensor:
    """Index of the first number equal to the extreme one; PyTorch promises no order among equals."""
    size = x.shape[axis]
    places = torch.arange(size).reshape([size if place == axis % x.dim() else 1 for place in range(x.dim())])
    return torch.where(x == extreme, places, size).amin(axis, keepdim=keep_dims)


def _axes(axes: list[int] | None, x: Tensor) -> list[int]:
    """Axes counted from the front; None means all."""
    wanted = list(range(x.dim())) if axes is None else axes
    require(all(-x.dim() <= axis < x.dim() for axis in wanted), f"axes {wanted} of {list(x.shape)}")
    found = [axis % x.dim() for axis in wanted]
    require(len(set(found)) == len(found) and (len(found) > 0 or x.dim() == 0), f"axes {wanted} of {list(x.shape)}")
    return found


def _as_given(result: Tensor, x: Tensor) -> Tensor:
    return result.to(x.dtype)
