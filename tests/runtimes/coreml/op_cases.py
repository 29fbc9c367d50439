# SPDX-License-Identifier: Apache-2.0
"""One case or more per op that the evaluator knows: its inputs, its parameters, and the same op in PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RNG = np.random.default_rng(5)
Case = tuple[str, str, dict[str, np.ndarray], dict[str, Any], Callable[..., Any]]
CASES: list[Case] = []


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.1, 3, shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def case(
    kind: str,
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    expected: Callable[..., Any],
    target: str = "iOS18",
) -> None:
    """`expected` gets the inputs as tensors by position and returns a tensor or a tuple."""
    CASES.append((kind, target, dict(inputs), dict(parameters), expected))


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


X = normal(2, 3, 4)
IMAGE = normal(1, 6, 7, 8)

for name, function in {
    "abs": torch.abs, "atan": torch.atan, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "exp": torch.exp,
    "exp2": torch.exp2, "floor": torch.floor, "relu": torch.relu, "relu6": F.relu6, "round": torch.round,
    "sigmoid": torch.sigmoid, "sign": torch.sign, "silu": F.silu, "sin": torch.sin, "softplus": F.softplus,
    "softsign": F.softsign, "square": torch.square, "tan": torch.tan, "tanh": torch.tanh, "identity": torch.clone,
}.items():  # fmt: skip
    case(name, {"x": X * 3}, {}, function)
case("sqrt", {"x": positive(2, 3)}, {}, torch.sqrt)
case("softplus", {"x": np.array([-100, 0, 30, 100], np.float32)}, {}, lambda x: F.softplus(x.double()).float())
case("logical_not", {"x": np.array([True, False])}, {}, torch.logical_not)

for name, function in {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt,
    "less_equal": torch.le, "equal": torch.eq, "not_equal": torch.ne, "mod": torch.remainder,
    "floor_div": lambda x, y: torch.floor(x / y),
}.items():  # fmt: skip
    case(name, {"x": X, "y": normal(3, 1)}, {}, function)
case("pow", {"x": positive(2, 3), "y": normal(3)}, {}, torch.pow)
case("equal", {"x": integers(0, 3, 4, 4), "y": integers(0, 3, 4, 4)}, {}, torch.eq)
case("floor_div", {"x": integers(-9, 9, 20), "y": i32(4)}, {}, lambda x, y: torch.div(x, y, rounding_mode="floor"))
case("mod", {"x": integers(-9, 9, 20), "y": i32(4)}, {}, torch.remainder)
for name in ("logical_and", "logical_or", "logical_xor"):
    flags = {"x": np.array([True, True, False, False]), "y": np.array([True, False, True, False])}
    case(name, flags, {}, getattr(torch, name))

case("rsqrt", {"x": positive(5)}, {"epsilon": np.float32(0.5)}, lambda x: torch.rsqrt(x + 0.5))
case("inverse", {"x": positive(5)}, {}, lambda x: 1 / (x + 1e-4))
case("log", {"x": positive(5)}, {"epsilon": np.float32(0.1)}, lambda x: torch.log(x + 0.1))
case("clip", {"x": X}, {"alpha": np.float32(-0.5), "beta": np.float32(0.25)}, lambda x: x.clamp(-0.5, 0.25))
case("threshold", {"x": X}, {"alpha": np.float32(0.25)}, lambda x: x.clamp(min=0.25))
case("leaky_relu", {"x": X}, {"alpha": np.float32(0.1)}, lambda x: F.leaky_relu(x, 0.1))
case("elu", {"x": X}, {"alpha": np.float32(0.7)}, lambda x: F.elu(x, 0.7))
SLOPES = np.arange(6, dtype=np.float32) / 10
case("prelu", {"x": IMAGE}, {"alpha": SLOPES}, lambda x: F.prelu(x, torch.from_numpy(SLOPES)))
case("scaled_tanh", {"x": X}, {"alpha": np.float32(1.5), "beta": np.float32(0.5)}, lambda x: 1.5 * torch.tanh(x / 2))
case(
    "sigmoid_hard",
    {"x": X * 5},
    {"alpha": np.float32(0.2), "beta": np.float32(0.5)},
    lambda x: (x / 5 + 0.5).clamp(0, 1),
)
case("linear_activation", {"x": X}, {"alpha": np.float32(3), "beta": np.float32(-1)}, lambda x: 3 * x - 1)
case("gelu", {"x": X * 3}, {"mode": "EXACT"}, F.gelu)
case("gelu", {"x": X * 3}, {"mode": "TANH_APPROXIMATION"}, lambda x: F.gelu(x, approximate="tanh"))
case("gelu", {"x": X * 3}, {"mode": "SIGMOID_APPROXIMATION"}, lambda x: x * torch.sigmoid(1.702 * x))
case("select", {"cond": X > 0, "a": normal(2, 3, 4), "b": normal(2, 3, 4)}, {}, torch.where)
for dtype, kind in {"int32": torch.int32, "bool": torch.bool, "fp32": torch.float32}.items():
    case("cast", {"x": X * 3}, {"dtype": dtype}, lambda x, kind=kind: x.to(kind))
case("cast", {"x": np.round(X * 8) / 8}, {"dtype": "fp16"}, lambda x: x)
case("cast", {"x": integers(-5, 5, 6)}, {"dtype": "fp32"}, lambda x: x.float())
case("cast", {"x": integers(0, 200, 6)}, {"dtype": "uint16"}, lambda x: x)
for dtype, low, high in (("int8", -128, 127), ("uint8", 0, 255)):
    zero = np.array([3, 4, 5], np.dtype(dtype))
    scale = np.float32([0.1, 0.2, 0.01])
    case(
        "quantize",
        {"input": X},
        {"scale": scale, "zero_point": zero, "axis": np.int32(1), "output_dtype": dtype},
        lambda x, low=low, high=high: (
            (torch.round(x / torch.tensor([0.1, 0.2, 0.01])[:, None]) + torch.tensor([3, 4, 5])[:, None])
            .clamp(low, high)
            .int()
        ),
    )

W, BIAS = normal(5, 4), normal(5)
case("linear", {"x": X}, {"weight": W, "bias": BIAS}, lambda x: x @ torch.from_numpy(W).T + torch.from_numpy(BIAS))
case("linear", {"x": X}, {"weight": W}, lambda x: x @ torch.from_numpy(W).T)
A, B = normal(2, 3, 70), normal(2, 70, 5)
case("matmul", {"x": A, "y": B}, {}, torch.matmul)
case("matmul", {"x": A, "y": B.swapaxes(1, 2).copy()}, {"transpose_y": True}, lambda x, y: x @ y.mT)
case("matmul", {"x": A.swapaxes(1, 2).copy(), "y": B}, {"transpose_x": True}, lambda x, y: x.mT @ y)
case("matmul", {"x": normal(4, 1, 2, 3), "y": normal(5, 3, 2)}, {}, torch.matmul)
for equation, left, right in (
    ("nchw,nwhu->nchu", normal(2, 3, 4, 5), normal(2, 5, 4, 6)),
    ("chw,whr->chr", normal(3, 4, 5), normal(5, 4, 6)),
):
    case("einsum", {"a": left, "b": right}, {"equation": equation}, lambda a, b, e=equation: torch.einsum(e, a, b))

for parameters, settings in (
    ({}, {}),
    ({"pad_type": "custom", "pad": i32(1, 1, 1, 1)}, {"padding": 1}),
    ({"pad_type": "custom", "pad": i32(0, 1, 2, 3), "strides": i32(2, 1)}, {"stride": (2, 1), "around": (2, 3, 0, 1)}),
    ({"dilations": i32(2, 2), "groups": 2}, {"dilation": 2, "groups": 2}),
    ({"strides": i32(2, 2), "groups": 6}, {"stride": 2, "groups": 6}),
):
    weight = normal(12, 6 // parameters.get("groups", 1), 3, 3)
    bias = normal(12)

    def convolved(x: Tensor, weight: np.ndarray = weight, bias: np.ndarray = bias, settings: Any = settings) -> Tensor:
        options = dict(settings)
        padded = F.pad(x, options.pop("around", (0, 0, 0, 0)))
        return F.conv2d(padded, torch.from_numpy(weight), torch.from_numpy(bias), **options)

    case("conv", {"x": IMAGE}, {"weight": weight, "bias": bias, **parameters}, convolved)
for pad_type, size, strides, around in (
    ("same", 7, 2, (1, 1)), ("same", 8, 2, (0, 1)), ("same_lower", 8, 2, (1, 0)), ("same", 8, 1, (1, 1)),
):  # fmt: skip
    line, kernel = normal(1, 2, size), normal(3, 2, 3)

    def same(x: Tensor, kernel: np.ndarray = kernel, strides: int = strides, around: Any = around) -> Tensor:
        return F.conv1d(F.pad(x, around), torch.from_numpy(kernel), stride=strides)

    case("conv", {"x": line}, {"weight": kernel, "pad_type": pad_type, "strides": i32(strides)}, same)
VOLUME, CUBE = normal(1, 2, 4, 5, 6), normal(3, 2, 2, 3, 2)
case("conv", {"x": VOLUME}, {"weight": CUBE}, lambda x: F.conv3d(x, torch.from_numpy(CUBE)))
for parameters, settings in (
    ({"strides": i32(2, 2)}, {"stride": 2}),
    ({"strides": i32(2, 2), "pad_type": "custom", "pad": i32(1, 1, 1, 1)}, {"stride": 2, "padding": 1}),
    ({"strides": i32(2, 3), "groups": 2, "dilations": i32(2, 1)}, {"stride": (2, 3), "groups": 2, "dilation": (2, 1)}),
    (
        {"strides": i32(2, 2), "pad_type": "custom", "pad": i32(1, 1, 1, 1), "output_shape": i32(1, 4, 14, 16)},
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
):
    weight = normal(6, 4 // parameters.get("groups", 1), 3, 3)
    case(
        "conv_transpose",
        {"x": IMAGE},
        {"weight": weight, **parameters},
        lambda x, w=weight, s=settings: F.conv_transpose2d(x, torch.from_numpy(w), None, **s),
    )
Q, K, V = normal(2, 4, 5, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 3)
QKV = {"query": Q, "key": K, "value": V}
case("scaled_dot_product_attention", QKV, {}, F.scaled_dot_product_attention)
case("scaled_dot_product_attention", QKV | {"attn_mask": normal(5, 7)}, {}, F.scaled_dot_product_attention)
MASK = np.tril(np.ones((5, 7), np.bool_))
case(
    "scaled_dot_product_attention",
    QKV,
    {"attn_mask": MASK},
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.from_numpy(MASK)),
)

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "reduce_sum": torch.sum, "reduce_mean": torch.mean, "reduce_max": torch.amax, "reduce_min": torch.amin,
    "reduce_sum_square": lambda x, axes, keep: (x * x).sum(axes, keep),
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: (x * x).sum(axes, keep).sqrt(),
    "reduce_log_sum_exp": torch.logsumexp,
}  # fmt: skip
for name, reduction in REDUCTIONS.items():
    for axes, keep in (((1,), False), ((0, -1), True), ((0, 1, 2), False)):
        case(
            name,
            {"x": X},
            {"axes": i32(*axes), "keep_dims": keep},
            lambda x, r=reduction, a=axes, k=keep: r(x, a, k),
        )
case("reduce_sum", {"x": integers(-9, 9, 3, 4)}, {"axes": i32(1)}, lambda x: x.sum(1).int())
TIES = np.array([[1, 3, 3, 0], [0, 0, -2, -2]], np.float32)
case("reduce_argmax", {"x": TIES}, {"axis": 1}, lambda x: torch.tensor([1, 0]))
case("reduce_argmin", {"x": TIES}, {"axis": -1, "keep_dims": True}, lambda x: torch.tensor([[3], [2]]))
case("softmax", {"x": X * 9}, {"axis": 1}, lambda x: torch.softmax(x, 1))
case("softmax", {"x": X}, {"axis": -1}, lambda x: torch.softmax(x, -1))
GAMMA, BETA = normal(4), normal(4)
case(
    "layer_norm",
    {"x": X + 3},
    {"axes": i32(-1), "gamma": GAMMA, "beta": BETA, "epsilon": np.float32(1e-3)},
    lambda x: F.layer_norm(x, (4,), torch.from_numpy(GAMMA), torch.from_numpy(BETA), 1e-3),
)
case("layer_norm", {"x": X}, {"axes": i32(1, 2)}, lambda x: F.layer_norm(x, (3, 4)))
case(
    "layer_norm", {"x": X}, {"axes": i32(1), "gamma": normal(3)[:3] * 0 + 2}, lambda x: 2 * F.layer_norm(x.mT, (3,)).mT
)
SIX = [normal(6) for _ in range(3)] + [positive(6)]
case(
    "instance_norm",
    {"x": IMAGE},
    {"gamma": SIX[0], "beta": SIX[1], "epsilon": np.float32(1e-3)},
    lambda x: F.instance_norm(x, weight=torch.from_numpy(SIX[0]), bias=torch.from_numpy(SIX[1]), eps=1e-3),
)
case(
    "batch_norm",
    {"x": IMAGE},
    {"mean": SIX[2], "variance": SIX[3], "gamma": SIX[0], "beta": SIX[1], "epsilon": np.float32(1e-3)},
    lambda x: F.batch_norm(x, *(torch.from_numpy(SIX[i]) for i in (2, 3, 0, 1)), eps=1e-3),
)
case(
    "batch_norm",
    {"x": IMAGE},
    {"mean": SIX[2], "variance": SIX[3]},
    lambda x: F.batch_norm(x, torch.from_numpy(SIX[2]), torch.from_numpy(SIX[3]), eps=1e-5),
)
case("l2_norm", {"x": X}, {"epsilon": np.float32(1e-4)}, lambda x: x / (x.square().sum() + 1e-4).sqrt())

case("reshape", {"x": X}, {"shape": i32(4, 6)}, lambda x: x.reshape(4, 6))
case("reshape", {"x": X}, {"shape": i32(0, -1, 2)}, lambda x: x.reshape(2, 6, 2))
case("transpose", {"x": X}, {"perm": i32(2, 0, 1)}, lambda x: x.permute(2, 0, 1))
case("transpose", {"x": X}, {"perm": i32(0, -1, -2)}, lambda x: x.mT)
case("expand_dims", {"x": X}, {"axes": i32(0, -1)}, lambda x: x[None, ..., None])
case("expand_dims", {"x": X}, {"axes": i32(1, 2)}, lambda x: x[:, None, None])
case("squeeze", {"x": normal(1, 3, 1)}, {"axes": i32(-1)}, lambda x: x[..., 0])
case("squeeze", {"x": normal(1, 3, 1)}, {}, lambda x: x[0, :, 0])
case("flatten2d", {"x": X}, {"axis": 2}, lambda x: x.reshape(6, 4))
case("concat", {"a": X, "b": normal(2, 5, 4)}, {"axis": 1}, lambda a, b: torch.cat((a, b), 1))
case(
    "concat",
    {"a": X, "b": X + 1},
    {"axis": 1, "interleave": True},
    lambda a, b: torch.stack((a, b), 2).reshape(2, 6, 4),
)
case("stack", {"a": X, "b": X + 1}, {"axis": 1}, lambda a, b: torch.stack((a, b), 1))
case("split", {"x": X}, {"num_splits": 2, "axis": -1}, lambda x: x.split(2, -1))
case("split", {"x": X}, {"split_sizes": i32(1, 2), "axis": 1}, lambda x: x.split((1, 2), 1))
for begin, end, more, expected in (
    ((0, 1, 0), (2, 3, 2), {}, lambda x: x[:, 1:3, :2]),
    ((0, -2, 1), (2, -1, 4), {"stride": i32(1, 1, 2)}, lambda x: x[:, -2:-1, 1:4:2]),
    ((1, 0, 3), (0, 3, 0), {"stride": i32(-1, 1, -2)}, lambda x: x[[1]][..., [3, 1]]),
    ((1, 1, 1), (2, 2, 2), {"begin_mask": np.array([True, False, False])}, lambda x: x[:2, 1:2, 1:2]),
    ((1, 1, 1), (2, 2, 2), {"end_mask": np.array([False, True, True])}, lambda x: x[1:2, 1:, 1:]),
    ((1, -1, 1), (2, 0, 3), {"squeeze_mask": np.array([True, True, False])}, lambda x: x[1, -1, 1:3]),
    ((0, 0, 3), (2, 3, 0), {"stride": i32(1, 1, -1), "end_mask": np.array([False, False, True])}, lambda x: x.flip(2)),
):
    case("slice_by_index", {"x": X}, {"begin": i32(*begin), "end": i32(*end), **more}, expected)
case("slice_by_size", {"x": X}, {"begin": i32(0, 1, 1), "size": i32(2, -1, 2)}, lambda x: x[:, 1:, 1:3])
case("tile", {"x": X}, {"reps": i32(1, 2, 3)}, lambda x: x.repeat(1, 2, 3))
case("reverse", {"x": X}, {"axes": i32(0, -1)}, lambda x: x.flip(0, -1))
case("gather", {"x": X}, {"indices": i32(2, 0, 1, 1), "axis": 1}, lambda x: x[:, [2, 0, 1, 1]])
case("gather", {"x": X}, {"indices": np.int32([[1, 0]]), "axis": 0}, lambda x: x[torch.tensor([[1, 0]])])
case("gather", {"x": X}, {"indices": np.int32(1), "axis": -1}, lambda x: x[..., 1])
for narrow in (np.int16, np.uint16, np.int8, np.uint8):
    case("gather", {"x": X}, {"indices": np.array([2, 0], narrow), "axis": 1}, lambda x: x[:, [2, 0]])
case("gather", {"x": X}, {"indices": i32(-1, 0), "axis": 1}, lambda x: x[:, [-1, 0]], "iOS16")
BATCHED = integers(0, 3, 2, 5)
case(
    "gather",
    {"x": X},
    {"indices": BATCHED, "axis": 1, "batch_dims": 1},
    lambda x: torch.stack([x[i, torch.from_numpy(BATCHED[i])] for i in range(2)]),
)
ALONG = integers(0, 3, 2, 2, 4)
case(
    "gather_along_axis", {"x": X}, {"indices": ALONG, "axis": 1}, lambda x: x.gather(1, torch.from_numpy(ALONG).long())
)
case("gather_nd", {"x": X}, {"indices": np.int32([[0, 1], [1, 2]])}, lambda x: x[[0, 1], [1, 2]])
case("pad", {"x": X}, {"pad": i32(1, 2), "constant_val": np.float32(3)}, lambda x: F.pad(x, (1, 2), value=3))
case("pad", {"x": X}, {"pad": i32(1, 0, 0, 2), "mode": "constant"}, lambda x: F.pad(x, (0, 2, 1, 0)))
case("pad", {"x": IMAGE}, {"pad": i32(1, 2, 3, 4), "mode": "reflect"}, lambda x: F.pad(x, (3, 4, 1, 2), mode="reflect"))
case(
    "pad",
    {"x": IMAGE},
    {"pad": i32(1, 2, 9, 0), "mode": "replicate"},
    lambda x: F.pad(x, (9, 0, 1, 2), mode="replicate"),
)
case("fill_like", {"ref_tensor": X}, {"value": np.float32(2)}, lambda x: torch.full_like(x, 2))
case("shape", {"x": X}, {}, lambda x: torch.tensor(x.shape))
case("one_hot", {"indices": i32(2, 0)}, {"one_hot_vector_size": 3}, lambda x: F.one_hot(x.long(), 3).int())
case(
    "one_hot",
    {"indices": i32(2, 0)},
    {"one_hot_vector_size": 3, "axis": 0, "on_value": np.float32(5), "off_value": np.float32(-1)},
    lambda x: F.one_hot(x.long(), 3).T * 6.0 - 1,
)
case("cumsum", {"x": X}, {"axis": 1}, lambda x: x.cumsum(1))
case("cumsum", {"x": X}, {"axis": -1, "exclusive": True}, lambda x: x.cumsum(-1) - x)
case("cumsum", {"x": X}, {"axis": 1, "reverse": True}, lambda x: x.flip(1).cumsum(1).flip(1))
SQUARE = normal(4, 4)
case("band_part", {"x": SQUARE}, {"lower": 1, "upper": -1}, lambda x: x.triu(-1))
case("band_part", {"x": SQUARE}, {"lower": -1, "upper": 0}, torch.tril)
case("band_part", {"x": SQUARE}, {"lower": 2, "upper": 1}, lambda x: x.triu(-2).tril(1))

case(
    "upsample_nearest_neighbor",
    {"x": IMAGE},
    {"scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)},
    lambda x: F.interpolate(x, scale_factor=(2, 3)),
)
case(
    "resize_nearest_neighbor",
    {"x": IMAGE},
    {"target_size_height": 14, "target_size_width": 8},
    lambda x: F.interpolate(x, size=(14, 8)),
)
for corners in (True, False):
    bilinear = {"mode": "bilinear", "align_corners": corners}
    case(
        "upsample_bilinear",
        {"x": IMAGE},
        {
            "scale_factor_height": np.float32(2),
            "scale_factor_width": np.float32(2),
            "align_corners": corners,
            "half_pixel_centers": not corners,
        },
        lambda x, b=bilinear: F.interpolate(x, scale_factor=2, **b),
    )
    case(
        "resize_bilinear",
        {"x": IMAGE},
        {
            "target_size_height": 9,
            "target_size_width": 5,
            "sampling_mode": "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS",
        },
        lambda x, b=bilinear: F.interpolate(x, size=(9, 5), **b),
    )
CHANNELS = normal(1, 8, 4, 6)
case("pixel_shuffle", {"x": CHANNELS}, {"upscale_factor": 2}, lambda x: F.pixel_shuffle(x, 2))
case("pixel_unshuffle", {"x": CHANNELS}, {"downscale_factor": np.uint32(2)}, lambda x: F.pixel_unshuffle(x, 2))
POOL = {"kernel_sizes": i32(3, 2), "strides": i32(2, 2), "pad_type": "custom", "pad": i32(1, 1, 1, 1)}
case("max_pool", {"x": IMAGE}, {"kernel_sizes": i32(2, 2), "pad_type": "valid"}, lambda x: F.max_pool2d(x, 2, 1))
case("max_pool", {"x": IMAGE}, POOL, lambda x: F.max_pool2d(x, (3, 2), 2, 1))
for excluded in (True, False):
    case(
        "avg_pool",
        {"x": IMAGE},
        POOL | {"exclude_padding_from_average": excluded},
        lambda x, e=excluded: F.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=not e),
    )
