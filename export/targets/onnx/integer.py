# SPDX-License-Identifier: Apache-2.0
"""Integer weights beside floats in ONNX: Linear by MatMulNBits, Conv2d by DequantizeLinear and Conv.

O outputs, I inputs, K = kh kw I columns of the matrix view, G scales per row.
"""

import math

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from ....quant.activations import A8_DYNAMIC, A8_STATIC, A8_STEP, ActivationFormat
from ....quant.formats import Affine, CompressedTensor
from ....quant.formats.bits import pack
from ....quant.ranges import Ranges
from ....quant.rounding import keeps_digits
from ....quant.scheme import Scheme, with_activations
from ..layer import LayerBytes, LayerUse
from .data import StoredTensor
from .form import MICROSOFT, Array, Form, FormOptions, cast_to_fp32, conv_of
from .memory import unfolding_bytes

_SMALLEST_BLOCK = 16
_LARGEST_BLOCK = 256
_REPEATED = ".blocks"


class MatMulNBits(Form):
    """Linear with 4 or 8 bit codes: ONNX Runtime's own operator, which reads them as they are stored."""

    summary = "MatMulNBits: codes stay packed in memory"

    @classmethod
    def refusal(cls, format: Affine, shape: tuple[int, ...], options: FormOptions) -> str | None:
        columns = shape[1]
        group = format.group or _power_of_two_factor(columns)
        if group >= _SMALLEST_BLOCK and group & (group - 1) == 0:
            return None
        blocks = f"MatMulNBits scales blocks of 2^n columns, {_SMALLEST_BLOCK} or more"
        if format.group is None:
            return f"{blocks}: {columns} columns are a multiple of {group} only"
        return f"{blocks}, not {group}"

    @classmethod
    def resolved(cls, format: Affine, layer: str | None, options: FormOptions) -> Scheme:
        """Rounded inputs where the options say so; with calibrated scales if these leave digits enough."""
        if not _may_round(format, options):
            return Scheme(format)
        ranges = options.ranges.get(layer or "")
        if options.asked.activations == "dynamic" or (ranges and not keeps_digits(ranges, of_output=False)):
            return Scheme(format, A8_DYNAMIC)
        return Scheme(format, _calibrated(options, ranges))

    @property
    def block(self) -> int:
        """Columns per scale of the operator; a row's one scale is repeated over blocks when the graph is loaded."""
        return self.format.group or min(_power_of_two_factor(self.layer.shape[1]), _LARGEST_BLOCK)

    @property
    def _blocks(self) -> int:
        return self.layer.shape[1] // self.block

    @property
    def _repeats(self) -> bool:
        return self.format.group is None and self._blocks > 1

    def tensors(self) -> list[StoredTensor]:
        outputs, bits = self.layer.shape[0], self.format.bits
        groups = 1 if self.format.group is None else self._blocks
        stored = [
            self._tensor("codes", TensorProto.UINT8, (outputs, self._blocks, self.block * bits // 8)),
            self._tensor("scale", TensorProto.FLOAT16, (outputs, groups)),
        ]
        if not self.format.symmetric:
            packed = -(-groups * bits // 8)
            stored.append(self._tensor("zero_point", TensorProto.UINT8, (outputs, packed)))
        return stored

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        """The operator's codes are unsigned, around 8 or 128 when symmetric; its layout is that of the parts."""
        codes = weight.parts["codes"].numpy()
        if self.format.symmetric:
            codes = codes ^ (0x88 if self.format.bits == 4 else 0x80)
        stored = [codes, weight.parts["scale"].numpy()]
        if not self.format.symmetric:
            zero_point = weight.parts["zero_point"].numpy()
            if self._repeats and self.format.bits == 4:
                zero_point = zero_point | zero_point << 4  # both nibbles, so that whole bytes can be repeated
            stored.append(zero_point)
        return stored

    def values_memory(self, use: LayerUse) -> LayerBytes:
        """Codes of 4 bits are packed into private memory, and multiplied as they are. Those of 8 stay in their file and
        become a dense weight for the time of a product, but where activations are rounded to 8 bits as well."""
        scales = 4 * self.layer.shape[0] * self._blocks
        if self.format.bits == 4 or self.options.asked.accuracy_level == 4:
            return LayerBytes(self.format.nbytes(self.layer.shape) + scales)
        return LayerBytes(self.mapped_bytes + scales, self.dense_bytes)

    def prepare(self) -> list[NodeProto]:
        """fp16 scales become the fp32 that the operator wants: folded when loaded, 4 bytes per block in memory."""
        nodes = [cast_to_fp32(self._value("scale"), self._value("scale32"))]
        if self._repeats:
            nodes += _repeat(self._value("scale32"), self._blocks)
        if self._repeats and not self.format.symmetric:
            nodes += _repeat(self._value("zero_point"), -(-self._blocks * self.format.bits // 8))
        return nodes

    def apply(self, node: NodeProto) -> list[NodeProto]:
        repeated = _REPEATED if self._repeats else ""
        zero_point = "" if self.format.symmetric else self._value("zero_point") + repeated
        bias = node.input[2] if len(node.input) > 2 else ""
        inputs = [node.input[0], self._value("codes"), self._value("scale32") + repeated, zero_point, "", bias]
        while not inputs[-1]:
            inputs.pop()
        return [
            helper.make_node(
                "MatMulNBits",
                inputs,
                node.output,
                name=node.name,
                domain=MICROSOFT,
                K=self.layer.shape[1],
                N=self.layer.shape[0],
                bits=self.format.bits,
                block_size=self.block,
                accuracy_level=self.options.asked.accuracy_level,
            )
        ]


class DequantizedConv2d(Form):
    """Conv2d with 4 or 8 bit codes: made dense for the time of one convolution, layer by layer."""

    summary = "DequantizeLinear, Conv: codes stay packed in memory, one layer at a time is dense"

    @classmethod
    def refusal(cls, format: Affine, shape: tuple[int, ...], options: FormOptions) -> str | None:
        return None

    @classmethod
    def resolved(cls, format: Affine, layer: str | None, options: FormOptions) -> Scheme:
        """Calibrated scales where the options say that activations are rounded at all, if these leave digits enough."""
        ranges = options.ranges.get(layer or "")
        rounds = _may_round(format, options) and (ranges is None or keeps_digits(ranges))
        return with_activations(format, _calibrated(options, ranges)) if rounds else Scheme(format)

    def _scale_shape(self) -> tuple[int, ...]:
        outputs, inputs, height, width = self.layer.shape
        return (outputs,) if self.format.group is None else (outputs, inputs // self.format.group, height, width)

    @property
    def _code_type(self) -> int:
        types = {
            (4, True): TensorProto.INT4,
            (4, False): TensorProto.UINT4,
            (8, True): TensorProto.INT8,
            (8, False): TensorProto.UINT8,
        }
        return types[self.format.bits, self.format.symmetric]

    def tensors(self) -> list[StoredTensor]:
        scale_shape = self._scale_shape()
        stored = [
            self._tensor("codes", self._code_type, self.layer.shape),
            self._tensor("scale", TensorProto.FLOAT16, scale_shape),
        ]
        if not self.format.symmetric:
            stored.append(self._tensor("zero_point", self._code_type, scale_shape))
        return stored

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        """[O, kh kw I] becomes the [O, I, kh, kw] of ONNX, for codes as for the scales of groups."""
        codes_OK, scale_OG, zero_OG = self.format.unpack(weight)
        stored = [self._packed(self._channels_first(codes_OK)), self._channels_first(scale_OG).numpy()]
        if zero_OG is not None:
            stored.append(self._packed(self._channels_first(zero_OG)))
        return stored

    def _channels_first(self, matrix: Tensor) -> Tensor:
        outputs, _, height, width = self.layer.shape
        if matrix.shape[1] == 1:
            return matrix
        return matrix.reshape(outputs, height, width, -1).permute(0, 3, 1, 2).contiguous()

    def _packed(self, codes: Tensor) -> Array:
        flat = codes.flatten().view(torch.uint8)
        return (pack(flat[None], 4) if self.format.bits == 4 else flat).numpy()

    def values_memory(self, use: LayerUse) -> LayerBytes:
        scales = 4 * math.prod(self._scale_shape())
        unfolding = unfolding_bytes(self.layer.shape, use)
        return LayerBytes(self.mapped_bytes + scales, self.dense_bytes + unfolding, self.dense_bytes, unfolding)

    def prepare(self) -> list[NodeProto]:
        inputs = [self._value("codes"), self._value("scale32")]
        if not self.format.symmetric:
            inputs.append(self._value("zero_point"))
        blocks = {} if self.format.group is None else {"block_size": self.format.group}
        axis = 0 if self.format.group is None else 1
        return [
            cast_to_fp32(self._value("scale"), self._value("scale32")),
            helper.make_node("DequantizeLinear", inputs, [self._value("weight")], axis=axis, **blocks),
        ]

    def apply(self, node: NodeProto) -> list[NodeProto]:
        return [conv_of(node, self._value("weight"))]


def _may_round(format: Affine, options: FormOptions) -> bool:
    """Whether the options ask for activations to be rounded beside such weights."""
    return options.asked.activations != "float" and format.bits == 8 and format.symmetric and format.group is None


def _calibrated(options: FormOptions, ranges: Ranges | None) -> ActivationFormat:
    """Scales of each timestep where the options say so and a layer has timesteps, else one for all calls."""
    by_step = options.asked.activations == "step" and (ranges is None or ranges.steps)
    return A8_STEP if by_step else A8_STATIC


def _power_of_two_factor(number: int) -> int:
    return number & -number


def _repeat(column: str, times: int) -> list[NodeProto]:
    """Nodes from [O, 1] to `<column>.blocks` [O, times]."""
    counts = f"{column}.times"
    return [
        helper.make_node("Constant", [], [counts], value_ints=[1, times]),
        helper.make_node("Expand", [column, counts], [column + _REPEATED]),
    ]
