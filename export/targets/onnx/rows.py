# SPDX-License-Identifier: Apache-2.0
"""Products of rows that are rounded while the graph runs, each in a scale and zero point of its own.

ONNX Runtime's own dynamic product has one scale for the whole tensor: then a picture depends on those that are drawn
with it, and large values of one token cost all others their digits. Here rows are brought to one scale before the
product, and back behind it; the product is MatMulIntegerToFloat as for static scales. As functions, which ONNX Runtime
inlines, a layer is four nodes in the file. With a bias their names are others: ONNX Runtime before 1.27 does not tell
overloads of a name apart.

x̂ = s (q + z) with s = (max - min) / 255 and z = round(min / s), of a row and 0; q from 0 to 255. So
y = x̂ W + b = s (q W) + s z (1 W) + b, where 1 W are the sums of W's columns.
"""

from onnx import FunctionProto, NodeProto, TensorProto, helper

from .form import cast_to_fp32
from .names import BIASED, DOMAIN, OPSET

QUANTIZE_ROWS, COLUMN_SUMS, SCALE_ROWS = "QuantizeRows", "ColumnSums", "ScaleRows"
_STEPS = 255.0
_SMALLEST_SCALE = 2.0**-23


def row_functions(biased: bool) -> list[FunctionProto]:
    """Bodies of the three operators.

    QuantizeRows (x [..., I]) gives q uint8 [..., I], s and z [..., 1]. ColumnSums (codes int8 [I, O], scale [O],
    bias [O]?) gives [1, O], or [2, O] with the bias below. ScaleRows (q W [..., O], s, z, those sums) gives y.
    """
    return [_function(QUANTIZE_ROWS, ["x"], ["q", "s", "z"], _quantize()), _sums(biased), _scale(biased)]


def named(operator: str, biased: bool) -> str:
    """Of an operator that takes the bias in, or not."""
    return f"{operator}{BIASED}" if biased else operator


def _quantize() -> list[NodeProto]:
    return [
        helper.make_node("Constant", [], ["last"], value_ints=[-1]),
        _number("zero", 0.0),
        _number("steps", _STEPS),
        _number("smallest", _SMALLEST_SCALE),
        _number("one", 1.0),
        helper.make_node("ReduceMax", ["x", "last"], ["most"], keepdims=1),
        helper.make_node("ReduceMin", ["x", "last"], ["least"], keepdims=1),
        helper.make_node("Max", ["most", "zero"], ["high"]),
        helper.make_node("Min", ["least", "zero"], ["low"]),
        helper.make_node("Sub", ["high", "low"], ["span"]),
        helper.make_node("Div", ["span", "steps"], ["step"]),
        helper.make_node("Max", ["step", "smallest"], ["s"]),
        helper.make_node("Div", ["low", "s"], ["lowest"]),
        helper.make_node("Round", ["lowest"], ["z"]),
        helper.make_node("Div", ["x", "s"], ["counted"]),
        helper.make_node("Sub", ["counted", "z"], ["shifted"]),
        helper.make_node("QuantizeLinear", ["shifted", "one"], ["q"]),  # without a zero point: uint8
    ]


def _sums(biased: bool) -> FunctionProto:
    """All of it is folded when the graph is loaded; ones times codes needs no copy of the codes in another type."""
    row = "sums" if biased else "rows"
    nodes = [
        helper.make_node("Shape", ["codes"], ["width"], start=0, end=1),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Concat", ["one", "width"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=_uint8_one()),
        helper.make_node("MatMulInteger", ["ones", "codes"], ["counts"]),
        cast_to_fp32("counts", "counts32"),
        helper.make_node("Mul", ["counts32", "scale"], [row]),
    ]
    if biased:
        nodes += [
            helper.make_node("Constant", [], ["first"], value_ints=[0]),
            helper.make_node("Unsqueeze", ["bias", "first"], ["below"]),
            helper.make_node("Concat", ["sums", "below"], ["rows"], axis=0),
        ]
    inputs = ["codes", "scale", *(["bias"] if biased else [])]
    return _function(named(COLUMN_SUMS, biased), inputs, ["rows"], nodes)


def _scale(biased: bool) -> FunctionProto:
    """The bias is added by the product that adds what z makes: its row is multiplied by s / s."""
    factors = "both" if biased else "offset"
    nodes = [
        helper.make_node("Mul", ["s", "z"], ["offset"]),
        *(
            [
                helper.make_node("Div", ["s", "s"], ["one"]),
                helper.make_node("Concat", ["offset", "one"], ["both"], axis=-1),
            ]
            if biased
            else []
        ),
        helper.make_node("MatMul", [factors, "rows"], ["added"]),
        helper.make_node("Mul", ["product", "s"], ["scaled"]),
        helper.make_node("Add", ["scaled", "added"], ["y"]),
    ]
    return _function(named(SCALE_ROWS, biased), ["product", "s", "z", "rows"], ["y"], nodes)


def _function(name: str, inputs: list[str], outputs: list[str], nodes: list[NodeProto]) -> FunctionProto:
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, [helper.make_opsetid("", OPSET)])


def _number(name: str, value: float) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_float=value)


def _uint8_one() -> TensorProto:
    return helper.make_tensor("value", TensorProto.UINT8, [1], [1])
