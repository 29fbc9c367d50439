# SPDX-License-Identifier: Apache-2.0
"""Ops that treat every number alone: arithmetic, comparisons, activations, casts, integer quantisation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .arithmetic import Arithmetic
from .registry import op, require

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "floor_div": torch.floor_divide,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "pow": torch.pow,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
_CASTS = {
    "fp16": torch.float32,
    "fp32": torch.float32,
    "int8": torch.int32,
    "uint8": torch.int32,
    "int16": torch.int32,
    "uint16": torch.int32,
    "int32": torch.int32,
    "bool": torch.bool,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Arithmetic, Tensor], Tensor]:
    def compute(run: Arithmetic, x: Tensor) -> Tensor:
        return function(x)

    return compute


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Arithmetic, Tensor, Tensor], Tensor]:
    def compute(run: Arithmetic, x: Tensor, y: Tensor) -> Tensor:
        run.expect(torch.broadcast_shapes(x.shape, y.shape))
        require(x.dtype == y.dtype, f"x is {x.dtype}, y is {y.dtype}")
        return function(x, y)

    return compute


for _name, _function in _UNARY.items():
    op(_name)(_unary(_function))
for _name, _pair_function in _BINARY.items():
    op(_name)(_binary(_pair_function))


@op("identity", moves=True)
def identity(run: Arithmetic, x: Tensor) -> Tensor:
    return x


@op("real_div")
def real_div(run: Arithmetic, x: Tensor, y: Tensor) -> Tensor:
    run.expect(torch.broadcast_shapes(x.shape, y.shape))
    require(x.is_floating_point() and y.is_floating_point(), "integers are divided, which the format leaves open")
    return x / y


@op("cast")
def cast(run: Arithmetic, x: Tensor, dtype: str) -> Tensor:
    require(dtype in _CASTS, f"a cast to {dtype!r}: known are {', '.join(_CASTS)}")
    wanted = _CASTS[dtype]
    if wanted == torch.bool:
        return x != 0
    if wanted == torch.int32 and x.is_floating_point():
        require(bool((x.abs() < 2**31).all()), f"a cast of numbers beyond {dtype}, which the format leaves open")
    return x.to(wanted)


@op("rsqrt")
def rsqrt(run: Arithmetic, x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(run.step(x + epsilon))


@op("inverse")
def inverse(run: Arithmetic, x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / run.step(x + epsilon)


@op("log")
def log(run: Arithmetic, x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(run.step(x + epsilon))


@op("clip")
def clip(run: Arithmetic, x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@op("threshold")
def threshold(run: Arithmetic, x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@op("leaky_relu")
def leaky_relu(run: Arithmetic, x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


@op("elu")
def elu(run: Arithmetic, x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@op("prelu")
def prelu(run: Arithmetic, x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


@op("scaled_tanh")
def scaled_tanh(run: Arithmetic, x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@op("sigmoid_hard")
def sigmoid_hard(run: Arithmetic, x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@op("linear_activation")
def linear_activation(run: Arithmetic, x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@op("gelu")
def gelu(run: Arithmetic, x: Tensor, mode: str = "EXACT") -> Tensor:
    match mode:
        case "EXACT":
            return F.gelu(x)
        case "TANH_APPROXIMATION":
            return F.gelu(x, approximate="tanh")
        case "SIGMOID_APPROXIMATION":
            return x * torch.sigmoid(1.702 * x)
    require(False, f"mode {mode!r}: known are EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")
    return x


@op("select")
def select(run: Arithmetic, cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    run.expect(torch.broadcast_shapes(cond.shape, a.shape, b.shape))
    require(cond.dtype == torch.bool and a.dtype == b.dtype, f"a {cond.dtype} choice of {a.dtype} and {b.dtype}")
    return torch.where(cond, a, b)


@op("quantize")
def quantize(
    run: Arithmetic,
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    require(output_dtype in ("int8", "uint8"), f"quantisation to {output_dtype!r}: known are int8, uint8")
    lowest = -128 if output_dtype == "int8" else 0
    steps = torch.round(input / _along(scale, axis, input))
    if zero_point is not None:
        steps = steps + _along(zero_point, axis, input)
    return steps.clamp(lowest, lowest + 255).to(torch.int32)


@op("dequantize")
def dequantize(
    run: Arithmetic,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    steps = input.float() if zero_point is None else input.float() - _along(zero_point, axis, input)
    return steps * _along(scale, axis, input)


def _along(vector: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """A scalar, or a vector placed along `axis` of x."""
    if vector.dim() == 0:
        return vector
    require(vector.dim() == 1 and axis is not None and -x.dim() <= axis < x.dim(), f"axis {axis} of {list(x.shape)}")
    shape = [1] * x.dim()
    shape[axis if axis is not None else 0] = vector.numel()
    return vector.reshape(shape)
