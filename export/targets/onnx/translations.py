# SPDX-License-Identifier: Apache-2.0
"""PyTorch's operators in ONNX where the exporter's own translation is not the one to have."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset21
from onnxscript.values import Op, Opset

from .form import MICROSOFT
from .names import DOMAIN
from .norm import GROUP_NORM

MANY_TOKENS = 256
"""From so many queries on attention is one operator, which never holds all scores at once: in SDXL at 1024 px these
are 671 MB in fp32 (4096 x 4096 for 10 heads). With fewer it is no faster."""


def _operator(domain: str, name: str, inputs: tuple[str, ...], **attributes: OpSchema.AttrType) -> Op:
    """One of floats; inputs whose names end in a question mark may be missing."""
    kinds = OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[
            OpSchema.FormalParameter(
                each.rstrip("?"), "T", param_option=kinds.Optional if each.endswith("?") else kinds.Single
            )
            for each in inputs
        ],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(attribute, kind) for attribute, kind in attributes.items()],
    )
    return Op(Opset(domain, 1), name, schema)


_INT, _INTS, _FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.INTS, OpSchema.AttrType.FLOAT
_WEIGHT = "x", "weight", "bias?"
_LINEAR = _operator(DOMAIN, "Linear", _WEIGHT)
_CONV2D = _operator(DOMAIN, "Conv2d", _WEIGHT, strides=_INTS, pads=_INTS, dilations=_INTS, group=_INT)
_GROUP_NORM = _operator(DOMAIN, GROUP_NORM, ("x", "weight?", "bias?"), groups=_INT, epsilon=_FLOAT, rank=_INT)
_WHOLE_ATTENTION = _operator(MICROSOFT, "MultiHeadAttention", ("query", "key", "value"), num_heads=_INT, scale=_FLOAT)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _LINEAR(x, weight, bias)


def _conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Any:
    pads = [*padding, *padding]
    return _CONV2D(x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    return _GROUP_NORM(x, weight, bias, groups=groups, epsilon=eps, rank=len(x.shape))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(Q Kᵀ · scale + mask) V with the scale as a number: the exporter's own form computes it from shapes."""
    if is_causal or enable_gqa or dropout_p:
        raise ValueError(f"attention with {is_causal=}, {enable_gqa=}, {dropout_p=} has no translation")
    scale = scale if scale is not None else query.shape[-1] ** -0.5
    if attn_mask is None and _has_many_tokens(query):
        return _attention_in_one(query, key, value, scale)
    factor = opset21.Constant(value_float=scale)
    scores = opset21.MatMul(opset21.Mul(query, factor), opset21.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        attn_mask = opset21.Where(
            attn_mask, opset21.Constant(value_float=0.0), opset21.Constant(value_float=float("-inf"))
        )
    if attn_mask is not None:
        scores = opset21.Add(scores, attn_mask)
    return opset21.MatMul(opset21.Softmax(scores, axis=-1), value)


def _has_many_tokens(query: Any) -> bool:
    tokens = query.shape[-2]
    return not isinstance(tokens, int) or tokens >= MANY_TOKENS


def _attention_in_one(query: Any, key: Any, value: Any, scale: float) -> Any:
    """[B, heads, T, d] by an operator over [B, T, heads d]; ONNX Runtime drops transpositions that undo each other."""
    heads, width = query.shape[1], value.shape[-1]

    def in_rows(x: Any) -> Any:
        shape = opset21.Constant(value_ints=[0, 0, heads * x.shape[-1]])
        return opset21.Reshape(opset21.Transpose(x, perm=[0, 2, 1, 3]), shape)

    y = _WHOLE_ATTENTION(*map(in_rows, (query, key, value)), num_heads=heads, scale=scale)
    by_head = opset21.Constant(value_ints=[0, 0, heads, width])
    return opset21.Transpose(opset21.Reshape(y, by_head), perm=[0, 2, 1, 3])


def _squeeze(x: Any, dim: int) -> Any:
    """PyTorch leaves a dimension of another size than 1 as it is, ONNX refuses it."""
    axes = opset21.Constant(value_ints=[dim])
    return opset21.Squeeze(x, axes) if x.shape[dim] == 1 else opset21.Identity(x)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.conv2d.default: _conv2d,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.squeeze.dim: _squeeze,
    torch.ops.aten.group_norm.default: _group_norm,
}
