# SPDX-License-Identifier: Apache-2.0
"""Layers that multiply integers by integers in ONNX Runtime: MatMulIntegerToFloat for Linear, QLinearConv for Conv2d.

They are written as the operators that run, not as QuantizeLinear and DequantizeLinear for ONNX Runtime to find
patterns in: a pattern that is missed runs in fp32, slower than without integers. Activations are unsigned and weights
signed, which is what its kernels for x86-64 (VNNI) multiply; the other way round takes as long as fp32 or longer.
A Linear hands on floats, a Conv2d integers, since QLinearConv has no other output.

O outputs, I inputs.
"""

import math
import struct
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import FunctionProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from ....ground.errors import TurbopocketError
from ....quant.activations import A8_DYNAMIC, A8_STATIC, A8_STEP, QParams
from ....quant.formats import Affine, CompressedTensor
from ....quant.formats.bits import pack
from ....quant.ranges import Ranges
from ....quant.rounding import StaticQParams, StepQParams, rounded, rounded_by_row
from ....quant.scheme import Scheme, with_activations
from ..layer import LayerBytes, LayerUse
from .data import StoredTensor
from .form import MICROSOFT, Array, Form, FormOptions, cast_to_fp32
from .names import DOMAIN
from .rows import COLUMN_SUMS, QUANTIZE_ROWS, SCALE_ROWS, named, row_functions
from .steps import STEP, StepColumn

Scales = QParams | StepColumn
"""Of one tensor: the same in all calls, or looked up by the timestep."""
BY_STEP = ", in scales that the graph looks up by its timestep"

_UNKNOWN = Ranges((0.0, 1.0), (0.0, 1.0), 1.0, 1.0)
"""Of a layer before calibration, whose bytes are the same with any."""
_LARGEST_BIAS = 2.0**31 - 128
"""The largest float32 that int32 holds."""


class _IntegerForm(Form):
    """Codes int8, or int4 that become int8 when the graph is loaded, and one scale a row."""

    @classmethod
    def refusal(cls, format: Affine, shape: tuple[int, ...], options: FormOptions) -> str | None:
        if not format.symmetric:
            return f"ONNX Runtime has no fast product of integers with a zero point in the weights, as {format} has"
        if format.group is not None:
            return f"ONNX Runtime's products of integers have one scale a row, not groups as {format}"
        return None

    def tensors(self) -> list[StoredTensor]:
        code_type = TensorProto.INT4 if self.format.bits == 4 else TensorProto.INT8
        return [
            self._tensor("codes", code_type, self._stored_shape()),
            self._tensor("scale", TensorProto.FLOAT16, self.layer.shape[:1]),
        ]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        codes_OK, scale_O1, _ = self.format.unpack(weight)
        flat = self._stored(codes_OK).flatten().view(torch.uint8)
        return [(pack(flat[None], 4) if self.format.bits == 4 else flat).numpy(), scale_O1[:, 0].numpy()]

    @abstractmethod
    def _stored_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _stored(self, codes_OK: Tensor) -> Tensor:
        """The codes in the order of `_stored_shape`."""

    def values_memory(self, use: LayerUse) -> LayerBytes:
        """Codes, int8 by then, are packed into private memory; beside activations in fp32 there are those in 8 bits."""
        return LayerBytes(math.prod(self.layer.shape) + 4 * self.layer.shape[0], self._rounded_bytes(use))

    @abstractmethod
    def _rounded_bytes(self, use: LayerUse) -> int:
        """Of what it makes of its input and output while it runs."""

    def prepare(self) -> list[NodeProto]:
        nodes = [cast_to_fp32(self._value("scale"), self._value("scale32"))]
        if self.format.bits == 4:
            nodes.append(helper.make_node("Cast", [self._value("codes")], [self._codes], to=TensorProto.INT8))
        return nodes

    @property
    def _codes(self) -> str:
        return self._value("codes8" if self.format.bits == 4 else "codes")

    @property
    def _ends(self) -> tuple[Scales, Scales]:
        """Of input and output: of each timestep where the scheme says so and the component has timesteps."""
        ranges = self.options.ranges.get(self.layer.name, _UNKNOWN)
        if not self.scheme.is_by_step or not ranges.steps:
            static = StaticQParams.of(ranges)
            return static.input, static.output
        found = StepQParams.of(ranges)
        inputs, outputs = zip(*((step.input, step.output) for step in found.steps), strict=True)
        return StepColumn(found.timesteps, inputs), StepColumn(found.timesteps, outputs)

    @abstractmethod
    def _rounds_by(self) -> list[Scales]:
        """What its nodes round by."""

    def constants(self) -> list[TensorProto]:
        return [constant for each in self._rounds_by() for constant in constants_of(each)]

    def columns(self) -> list[StepColumn]:
        return [each for each in self._rounds_by() if isinstance(each, StepColumn)]

    def _rounded(self, scales: Scales) -> Callable[[Tensor], Tensor]:
        """What a tensor becomes, as the nodes have it."""
        if isinstance(scales, StepColumn):
            return lambda x: self.options.clock.rounded(x, scales)
        return lambda x: rounded(x, scales)

    def require_calibrated(self) -> None:
        if self.scheme.is_static and self.layer.name not in self.options.ranges:
            raise TurbopocketError(f"{self.layer.name}: {self.scheme} needs the ranges that calibration saw")


class IntegerLinear(_IntegerForm):
    """Linear by MatMulIntegerToFloat, its weight [I, O]."""

    summary = "MatMulIntegerToFloat: uint8 inputs, int8 weights, floats come out"

    @classmethod
    def rounding_refusal(cls, scheme: Scheme) -> str | None:
        weight = scheme.weight
        calibrated = [each for a8 in (A8_STATIC, A8_STEP) for each in (Scheme(weight, a8), Scheme(weight, a8, a8))]
        if scheme in (with_activations(weight, A8_DYNAMIC), *calibrated):
            return None
        return "ONNX Runtime rounds a Linear's input to 8 bits, and its output where both scales are calibrated alike"

    @classmethod
    def stored_as(cls, scheme: Scheme) -> str:
        if scheme.input == A8_DYNAMIC:
            return "MatMulIntegerToFloat: inputs are rounded to uint8 row by row while it runs, weights are int8"
        summary = cls.summary if scheme.output is None else f"{cls.summary}, and are rounded to uint8"
        return f"{summary}{BY_STEP}" if scheme.is_by_step else summary

    def _stored_shape(self) -> tuple[int, ...]:
        return (self.layer.shape[1], self.layer.shape[0])

    def _stored(self, codes_OK: Tensor) -> Tensor:
        return codes_OK.T.contiguous()

    def _rounded_bytes(self, use: LayerUse) -> int:
        """By row: steps counted and shifted in fp32, the codes, and the product before it is scaled back."""
        return 9 * use.inputs + 4 * use.outputs if self._by_row else use.inputs + use.outputs

    @property
    def _by_row(self) -> bool:
        return self.scheme.input == A8_DYNAMIC

    def constants(self) -> list[TensorProto]:
        return [_scale(1.0), _zero_point(0)] if self._by_row else super().constants()

    def _rounds_by(self) -> list[Scales]:
        return [] if self._by_row else list(self._ends[: 1 if self.scheme.output is None else 2])

    def apply(self, node: NodeProto) -> list[NodeProto]:
        return self._apply_by_row(node) if self._by_row else self._apply_static(node)

    def _apply_static(self, node: NodeProto) -> list[NodeProto]:
        y, (input, output) = node.output[0], self._ends
        codes, scales = f"{y}/codes", names_of(input)
        bias = ["", node.input[2]] if len(node.input) > 2 else []
        product = y if self.scheme.output is None else f"{y}/product"
        nodes = [
            helper.make_node("QuantizeLinear", [node.input[0], *scales], [codes], name=codes),
            self._product(codes, scales, product, bias, node.name if product == y else f"{node.name}/product"),
        ]
        return nodes if product == y else [*nodes, *rounded_nodes(product, node, output)]

    def _apply_by_row(self, node: NodeProto) -> list[NodeProto]:
        y = node.output[0]
        codes, scale, zero, sums, product = (f"{y}/{each}" for each in ("codes", "scale", "zero", "sums", "product"))
        one = _scale(1.0).name, _zero_point(0).name
        bias = node.input[2:]
        sum_columns, scale_rows = (named(operator, biased=bool(bias)) for operator in (COLUMN_SUMS, SCALE_ROWS))
        weight = [self._codes, self._value("scale32"), *bias]
        return [
            helper.make_node(sum_columns, weight, [sums], name=sums, domain=DOMAIN),
            helper.make_node(QUANTIZE_ROWS, node.input[:1], [codes, scale, zero], name=codes, domain=DOMAIN),
            self._product(codes, one, product, [], product),
            helper.make_node(scale_rows, [product, scale, zero, sums], [y], name=node.name, domain=DOMAIN),
        ]

    def _product(self, codes: str, scales: Sequence[str], product: str, bias: Sequence[str], name: str) -> NodeProto:
        """Of codes with this scale and zero point, by the weight."""
        scale, zero_point = scales
        inputs = [codes, self._codes, scale, self._value("scale32"), zero_point, *bias]
        return helper.make_node("MatMulIntegerToFloat", inputs, [product], name=name, domain=MICROSOFT)

    def functions(self, node: NodeProto) -> list[FunctionProto]:
        return row_functions(biased=len(node.input) > 2) if self._by_row else []

    def reference(self, module: nn.Module, weight: CompressedTensor) -> nn.Module:
        self.require_calibrated()
        if self._by_row:
            return rounding(super().reference(module, weight), rounded_by_row, None)
        input, output = map(self._rounded, self._ends)
        return rounding(super().reference(module, weight), input, None if self.scheme.output is None else output)


class IntegerConv2d(_IntegerForm):
    """Conv2d by QLinearConv."""

    summary = "QLinearConv: uint8 inputs and outputs, int8 weights"

    @classmethod
    def rounding_refusal(cls, scheme: Scheme) -> str | None:
        if scheme in (with_activations(scheme.weight, A8_STATIC), with_activations(scheme.weight, A8_STEP)):
            return None
        if scheme.input == A8_DYNAMIC:
            return "ONNX Runtime's convolution with scales found while it runs takes several times as long as fp32"
        return "ONNX Runtime's convolution of integers rounds inputs and outputs to 8 bits, with calibrated scales"

    @classmethod
    def stored_as(cls, scheme: Scheme) -> str:
        return f"{cls.summary}{BY_STEP}" if scheme.is_by_step else cls.summary

    def _stored_shape(self) -> tuple[int, ...]:
        return self.layer.shape

    def _stored(self, codes_OK: Tensor) -> Tensor:
        outputs, _, height, width = self.layer.shape
        return codes_OK.reshape(outputs, height, width, -1).permute(0, 3, 1, 2).contiguous()

    def _rounded_bytes(self, use: LayerUse) -> int:
        """Each in its own order and with channels last."""
        return 2 * (use.inputs + use.outputs)

    def constants(self) -> list[TensorProto]:
        scales = [each.all_scales() for each in self._ends[:1] if isinstance(each, StepColumn)]
        return [*super().constants(), *scales, _WEIGHT_ZERO_POINT]

    def _rounds_by(self) -> list[Scales]:
        return list(self._ends)

    def apply(self, node: NodeProto) -> list[NodeProto]:
        y, (input, output) = node.output[0], self._ends
        codes, product, bias = f"{y}/codes", f"{y}/product", f"{y}/bias"
        scales = names_of(input)
        weight = [self._codes, self._value("scale32"), _WEIGHT_ZERO_POINT.name]
        biased = len(node.input) > 2
        inputs = [codes, *scales, *weight, *names_of(output), *([bias] if biased else [])]
        conv = helper.make_node("QLinearConv", inputs, [product], name=product)
        conv.attribute.extend(node.attribute)
        return [
            *(self._rounded_bias(node, bias, input) if biased else []),
            helper.make_node("QuantizeLinear", [node.input[0], *scales], [codes], name=codes),
            conv,
            helper.make_node("DequantizeLinear", [product, *names_of(output)], [y], name=node.name),
        ]

    def _rounded_bias(self, node: NodeProto, bias: str, input: Scales) -> list[NodeProto]:
        """int32 multiples of a product's scale, made when the graph is loaded: of all timesteps [T, O], where there are
        several, of which one row is taken."""
        step, steps, whole, fitting = (f"{bias}/{part}" for part in ("step", "steps", "whole", "fitting"))
        made, scale, chosen = bias, names_of(input)[0], []
        if isinstance(input, StepColumn):
            made, scale = f"{bias}/all", input.all_scales().name
            chosen = [helper.make_node("Gather", [made, STEP], [bias], name=bias)]
        ends = [f"{bias}/least", f"{bias}/most"]
        return [
            helper.make_node("Mul", [self._value("scale32"), scale], [step], name=step),
            helper.make_node("Div", [node.input[2], step], [steps], name=steps),
            helper.make_node("Round", [steps], [whole], name=whole),
            helper.make_node("Constant", [], ends[:1], value_float=-_LARGEST_BIAS),
            helper.make_node("Constant", [], ends[1:], value_float=_LARGEST_BIAS),
            helper.make_node("Clip", [whole, *ends], [fitting], name=fitting),
            helper.make_node("Cast", [fitting], [made], name=made, to=TensorProto.INT32),
            *chosen,
        ]

    def reference(self, module: nn.Module, weight: CompressedTensor) -> nn.Module:
        self.require_calibrated()
        found, scale_O = super().reference(module, weight), weight.parts["scale"][:, 0].float()
        (input, output), bias = self._ends, found.bias
        if isinstance(bias, Tensor) and isinstance(input, StepColumn):
            bias_TO = torch.stack([_bias_in_steps(bias, scale_O * each.scale) for each in input.qparams])
            found.register_parameter("bias", None)
            found.register_forward_hook(lambda layer, x, y: y + self.options.clock.row(bias_TO, input)[:, None, None])
        elif isinstance(bias, Tensor):
            assert isinstance(input, QParams)
            rounded_O = _bias_in_steps(bias, scale_O * input.scale)
            found.bias = nn.Parameter(rounded_O, requires_grad=False)
        return rounding(found, self._rounded(input), self._rounded(output))


def rounded_nodes(value: str, node: NodeProto, scales_of: Scales) -> list[NodeProto]:
    """From a value to the output of the traced node, which is that value in steps."""
    codes, scales = f"{node.output[0]}/rounded", names_of(scales_of)
    return [
        helper.make_node("QuantizeLinear", [value, *scales], [codes], name=codes),
        helper.make_node("DequantizeLinear", [codes, *scales], node.output, name=node.name),
    ]


def constants_of(scales: Scales) -> list[TensorProto]:
    """Scale and unsigned zero point of a tensor; none where they are looked up."""
    if isinstance(scales, StepColumn):
        return []
    return [_scale(scales.scale), _zero_point(scales.zero_point - scales.lowest)]


def names_of(scales: Scales) -> list[str]:
    """Of the values that are scale and zero point."""
    return scales.names if isinstance(scales, StepColumn) else [each.name for each in constants_of(scales)]


def _scale(scale: float) -> TensorProto:
    """Named by its value: equal ones are one initializer, so that equal roundings of one tensor become one."""
    raw = struct.pack("<f", scale)
    return TensorProto(name=f"scale.{raw[::-1].hex()}", data_type=TensorProto.FLOAT, raw_data=raw)


def _zero_point(zero_point: int) -> TensorProto:
    raw = bytes([zero_point])
    return TensorProto(name=f"zero_point.{raw.hex()}", data_type=TensorProto.UINT8, raw_data=raw)


_WEIGHT_ZERO_POINT = TensorProto(name="zero_point.int8", data_type=TensorProto.INT8, raw_data=bytes(1))


def _bias_in_steps(bias_O: Tensor, step_O: Tensor) -> Tensor:
    return torch.round(bias_O.detach() / step_O) * step_O


def rounding(layer: nn.Module, of_input: Any, of_output: Any) -> nn.Module:
    """The layer itself, which from now on rounds what it is given, and what it gives, by these functions."""
    layer.register_forward_pre_hook(lambda module, arguments: (of_input(arguments[0]), *arguments[1:]))
    if of_output is not None:
        layer.register_forward_hook(lambda module, arguments, y: of_output(y))
    return layer
