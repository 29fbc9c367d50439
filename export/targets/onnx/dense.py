# SPDX-License-Identifier: Apache-2.0
"""Floating-point weights in ONNX: `fp32` and `fp16`."""

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from ....quant.formats import CompressedTensor, Dense
from ..layer import LayerBytes, LayerUse
from .data import StoredTensor
from .form import Array, Form, FormOptions, cast_to_fp32, conv_of
from .memory import unfolding_bytes
from .unfolded import unfolded, unfolded_shape


class _DenseForm(Form):
    """Weights as floating-point numbers. fp16 becomes fp32 at every use, so it must not be folded."""

    @classmethod
    def refusal(cls, format: Dense, shape: tuple[int, ...], options: FormOptions) -> str | None:
        return None

    def once(self) -> GraphProto:
        return unfolded_shape(len(self._stored_shape())) if self.format.bits == 16 else GraphProto()

    def value_shapes(self) -> list[ValueInfoProto]:
        """Else Conv's output has no shape, and graph optimizations that ask for one are left out."""
        if self.format.bits == 32:
            return []
        return [helper.make_tensor_value_info(self._value("weight"), TensorProto.FLOAT, self._stored_shape())]

    def _stored_shape(self) -> tuple[int, ...]:
        return self.layer.shape

    def tensors(self) -> list[StoredTensor]:
        if self.format.bits == 16:
            return [self._tensor("weight16", TensorProto.FLOAT16, self._stored_shape())]
        return [self._tensor("weight", TensorProto.FLOAT, self._stored_shape())]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        return [weight.parts["weight"].numpy()]

    def values_memory(self, use: LayerUse) -> LayerBytes:
        """fp32 is packed into private memory; fp16 stays in its file, and a dense weight is made of it for each use."""
        if self.format.bits == 32:
            return LayerBytes(self.dense_bytes)
        unfolding = unfolding_bytes(self.layer.shape, use)
        return LayerBytes(self.mapped_bytes, self.dense_bytes + unfolding, self.dense_bytes, unfolding)

    def prepare(self) -> list[NodeProto]:
        if self.format.bits == 32:
            return []
        stored, half = self._value("weight16"), self._value("half")
        return [unfolded(stored, half, len(self._stored_shape())), cast_to_fp32(half, self._value("weight"))]


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
