# SPDX-License-Identifier: Apache-2.0
"""Codebooks in ONNX: operators of our own, each with a body of standard operators in the same file.

A runtime that knows the operator (domain `turbopocket`, version 1) runs its kernel and reads the codes as they are
stored; any other takes the body, which makes one layer's weight dense for the time of its product.

    CodebookLinear<M>(x [B, ..., K], codes uint8 [O, J, M], codebooks fp16 [M, 256, D], scale fp16 [O])
    CodebookLinear<M>Biased(the same, bias fp32 [O])
    CodebookConv2d<M>, CodebookConv2d<M>Biased(the same with x [B, I, H, W]; weight_shape [O, kh, kw, I], strides, pads,
        dilations)

Names differ wherever bodies do: ONNX has overloads for that, which ONNX Runtime before 1.27 does not tell apart.

y = scale * (x * Σ codebooks[m][codes[..., m]]) + bias, the weight in matrix-view order: vector j of a row holds columns
j D up to (j + 1) D of (kh, kw, I). O outputs, I inputs, K = kh kw I columns, M codebooks, D length of a vector,
J = K / D vectors per row.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ....quant.formats import CompressedTensor
from ..codebook import CodebookForm
from ..layer import LayerBytes, LayerUse
from .data import StoredTensor
from .form import Array, Form, cast_to_fp32
from .memory import unfolding_bytes
from .names import BIASED, DOMAIN, OPSET

_GEOMETRY = ("strides", "pads", "dilations")


class _CodebookForm(CodebookForm, Form):
    """One operator with the codes as they are stored, and the function that is its body."""

    reader = "ONNX"
    operator: str
    """Its name without the number of codebooks and the bias."""

    def tensors(self) -> list[StoredTensor]:
        codes, codebooks, scale = self.shapes()
        shared_name = f"{self.format}.codebooks"
        return [
            self._tensor("codes", TensorProto.UINT8, codes),
            StoredTensor(
                shared_name if self.format.shared_parts else self._value("codebooks"), TensorProto.FLOAT16, codebooks
            ),
            self._tensor("scale", TensorProto.FLOAT16, scale),
        ]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        return [part.numpy() for part in self.parts(weight)]

    def values_memory(self, use: LayerUse) -> LayerBytes:
        """Codes stay in their file. Of the body, not of our kernels: what `_decoded` and `_product` have alive at once.

        Two parts and their sum, of several codebooks; of one the indices in int32 and what they look up, or, of a
        convolution, that and the same with its scale. What is of no known rank gets no buffer that is kept: all but the
        weight that a convolution reads.
        """
        if self.layer.kind == "linear":
            indices = 4 * math.prod(self.shapes()[0])
            return LayerBytes(self.mapped_bytes, 3 * self.dense_bytes if self.count > 1 else self.dense_bytes + indices)
        decoding = (3 if self.count > 1 else 2) * self.dense_bytes
        unfolding = unfolding_bytes(self.layer.shape, use)
        alone = max(decoding, self.dense_bytes + unfolding)
        return LayerBytes(self.mapped_bytes, alone, self.dense_bytes, max(decoding, unfolding))

    def prepare(self) -> list[NodeProto]:
        return []

    def apply(self, node: NodeProto) -> list[NodeProto]:
        inputs = [node.input[0], *(tensor.name for tensor in self.tensors()), *node.input[2:]]
        applied = helper.make_node(self._name(node), inputs, node.output, name=node.name, domain=DOMAIN)
        applied.attribute.extend(self._attributes(node))
        return [applied]

    def functions(self, node: NodeProto) -> list[FunctionProto]:
        """The body of the operator for this number of codebooks, with or without a bias."""
        biased = len(node.input) > 2
        inputs = ["x", "codes", "codebooks", "scale", *(["bias"] if biased else [])]
        attributes = [attribute.name for attribute in self._attributes(node)]
        nodes = [*_decoded(self.count), *self._product(biased)]
        opset = [helper.make_opsetid("", OPSET)]
        return [helper.make_function(DOMAIN, self._name(node), inputs, ["y"], nodes, opset, attributes)]

    def _name(self, node: NodeProto) -> str:
        return f"{self.operator}{self.count}{BIASED if len(node.input) > 2 else ''}"

    def _attributes(self, node: NodeProto) -> list[AttributeProto]:
        return []

    @abstractmethod
    def _product(self, biased: bool) -> list[NodeProto]:
        """Nodes from x, `matrix` and `factor` to `y`."""


class CodebookLinear(_CodebookForm):
    """Linear whose weight is a sum of codebook vectors."""

    operator = "CodebookLinear"
    summary = "CodebookLinear, or Gather, Add, MatMul: codes stay packed in memory, one layer at a time is dense"

    def _product(self, biased: bool) -> list[NodeProto]:
        scaled = "scaled" if biased else "y"
        return [
            helper.make_node("Transpose", ["matrix"], ["transposed"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "transposed"], ["product"]),
            helper.make_node("Mul", ["product", "factor"], [scaled]),
            *([helper.make_node("Add", [scaled, "bias"], ["y"])] if biased else []),
        ]


class CodebookConv2d(_CodebookForm):
    """Conv2d whose weight is a sum of codebook vectors."""

    operator = "CodebookConv2d"
    summary = "CodebookConv2d, or Gather, Add, Conv: codes stay packed in memory, one layer at a time is dense"

    def _attributes(self, node: NodeProto) -> list[AttributeProto]:
        outputs, inputs, height, width = self.layer.shape
        geometry = [attribute for attribute in node.attribute if attribute.name in _GEOMETRY]
        return [helper.make_attribute("weight_shape", [outputs, height, width, inputs]), *geometry]

    def _product(self, biased: bool) -> list[NodeProto]:
        shape = helper.make_node("Constant", [], ["taps"])
        shape.attribute.append(_of_caller("value_ints", "weight_shape"))
        conv = helper.make_node("Conv", ["x", "weight", *(["bias"] if biased else [])], ["y"])
        conv.attribute.extend(_of_caller(name, name) for name in _GEOMETRY)
        return [
            shape,
            helper.make_node("Transpose", ["factor"], ["factors"], perm=[1, 0]),
            helper.make_node("Mul", ["matrix", "factors"], ["scaled"]),
            helper.make_node("Reshape", ["scaled", "taps"], ["channels_last"]),
            helper.make_node("Transpose", ["channels_last"], ["weight"], perm=[0, 3, 1, 2]),
            conv,
        ]


def _decoded(count: int) -> list[NodeProto]:
    """Nodes from codes, codebooks and scale to `matrix` [O, K], not scaled yet, and `factor` [1, O].

    Everything waits for x: codes, codebooks and scale get a dimension more at the front, whose place is x's number of
    values times 0. What depends on x is not folded into dense weights when the graph is loaded, nor decoded for all
    layers before the first one runs. It is also what makes a graph of many layers open fast:

    - No node but the constants' own is ready before x is. ONNX Runtime sorts a graph again for each of its passes, and
      walks through all that is ready for each node that becomes so.
    - Where the dimension goes is not known beforehand, and so no rank of what follows. ONNX Runtime's memory planner
      would keep a dense weight of known shape for the next of its shape, and compares one whose rank alone is known
      with all that are free, for every tensor of the graph.

    ONNX Runtime runs what leads to an input the sooner the later it stands in the list. So the sums stand last: two
    parts are alive at a time, however many codebooks there are.
    """
    books = [f"book{book}" for book in range(count)] if count > 1 else ["books"]
    planes = [f"indices{book}" for book in range(count)] if count > 1 else ["indices"]
    nodes = [
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Mul", ["size", "zero"], ["front"]),
        helper.make_node("Unsqueeze", ["scale", "front"], ["factor16"]),
        cast_to_fp32("factor16", "factor"),
        helper.make_node("Unsqueeze", ["codebooks", "front"], ["books16"]),
        cast_to_fp32("books16", "books"),
        helper.make_node("Unsqueeze", ["codes", "front"], ["ready"]),
        helper.make_node("Cast", ["ready"], ["indices"], to=TensorProto.INT32),
    ]
    if count > 1:
        nodes.append(helper.make_node("Split", ["books"], books, axis=1, num_outputs=count))
        nodes.append(helper.make_node("Split", ["indices"], planes, axis=3, num_outputs=count))
    for book in reversed(range(count)):
        nodes.append(helper.make_node("Gather", [books[book], planes[book]], [f"part{book}"], axis=2))
    total = "part0"
    for book in range(1, count):
        nodes.append(helper.make_node("Add", [total, f"part{book}"], [f"sum{book}"]))
        total = f"sum{book}"
    return [*nodes, helper.make_node("Flatten", [total], ["matrix"], axis=4)]


def _of_caller(name: str, attribute: str) -> AttributeProto:
    """Attribute `name` of a node in a body, with the value of the caller's `attribute`."""
    return AttributeProto(name=name, ref_attr_name=attribute, type=AttributeProto.INTS)


def distinct(functions: Sequence[FunctionProto]) -> list[FunctionProto]:
    """One of each operator, in the order of first use."""
    return list({function.name: function for function in functions}.values())
