# SPDX-License-Identifier: Apache-2.0
"""Floating-point weights in ONNX: `fp32` and `fp16`."""

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from ....quant.formats import CompressedTensor, Dense
from .data import StoredTensor
from .form import Array, Form, FormOptions, cast_to_fp32, conv_of


class _DenseForm(Form):
    """Weights as floating-point numbers. fp16 becomes fp32 at every use and is marked so that it is not folded."""

    @classmethod
    def refusal(cls, format: Dense, shape: tuple[int, ...], options: FormOptions) -> str | None:
        return None

    def overridable_inputs(self) -> list[ValueInfoProto]:
        if self.format.bits == 32:
            return []
        return [helper.make_tensor_value_info(t.name, t.dtype, t.shape) for t in self.tensors()]

    def _stored_shape(self) -> tuple[int, ...]:
        return self.layer.shape

    def tensors(self) -> list[StoredTensor]:
        if self.format.bits == 16:
            return [self._tensor("weight16", TensorProto.FLOAT16, self._stored_shape())]
        return [self._tensor("weight", TensorProto.FLOAT, self._stored_shape())]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        return [weight.parts["weight"].numpy()]

    def prepare(self) -> list[NodeProto]:
        return [cast_to_fp32(self._value("weight16"), self._value("weight"))] if self.format.bits == 16 else []


class DenseLinear(_DenseForm):
    """Linear as MatMul, stored [I, O]: the order MatMul reads, so no transposed copy appears in memory."""

    summary = "MatMul"

    def _stored_shape(self) -> tuple[int, ...]:
        return (self.layer.shape[1], self.layer.shape[0])

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        return [np.ascontiguousarray(weight.parts["weight"].numpy().T)]

    def apply(self, node: NodeProto) -> list[NodeProto]:
        inputs = [node.input[0], self._value("weight")]
        if len(node.input) < 3:
            return [helper.make_node("MatMul", inputs, node.output, name=node.name)]
        product = f"{node.output[0]}/product"
        return [
            helper.make_node("MatMul", inputs, [product], name=product),
            helper.make_node("Add", [product, node.input[2]], node.output, name=node.name),
        ]


class DenseConv2d(_DenseForm):
    """Conv2d as Conv."""

    summary = "Conv"

    def apply(self, node: NodeProto) -> list[NodeProto]:
        return [conv_of(node, self._value("weight"))]
