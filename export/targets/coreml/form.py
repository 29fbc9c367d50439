# SPDX-License-Identifier: Apache-2.0
"""What a layer's weight becomes in an ML program: tensors in the weight file and one constexpr operation of them.

O outputs, I inputs, K columns of the matrix view, G groups, kh kw kernel height and width.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ....quant.formats import CompressedTensor
from ....runtimes.coreml.file.dtypes import TensorType
from ...target_options import Deployment
from ..layer import Layer, LayerForm
from .mil import Message, operation, stored, tensor_type

Array = NDArray[Any]


@dataclass(frozen=True)
class MilLayer(Layer):
    """A layer of an ML program.

    `geometry` holds strides, paddings and dilations (h, w each) of a Conv2d; `wide` is True when the layer computes
    in fp32, so its weight must decode to fp32.
    """

    geometry: tuple[int, ...]
    wide: bool

    @property
    def float_type(self) -> str:
        """The element type that the layer computes in."""
        return "FLOAT32" if self.wide else "FLOAT16"


@dataclass(frozen=True)
class Form(LayerForm):
    """One layer in one scheme for one system, as tensors of the weight file and operations of them."""

    layer: MilLayer
    options: Deployment

    scales_outputs: ClassVar[bool] = False
    """Whether the last tensor is a scale [O] that multiplies the layer's output."""

    @property
    def deployment(self) -> Deployment:
        """The oldest system that reads it."""
        return self.options

    @property
    def products(self) -> int:
        """Weights that the layer multiplies with one after the other; its output is the sum."""
        return 1

    @abstractmethod
    def tensors(self) -> list[TensorType]:
        """What the weight file holds."""

    @abstractmethod
    def arrays(self, weight: CompressedTensor) -> list[Array]:
        """Values of `tensors`; those of fewer than 8 bits one per byte."""

    @abstractmethod
    def decoding(self, name: str, values: Sequence[Message]) -> Message:
        """The operation that decodes stored values to the weight of that name; of a sum, to one of its weights."""

    def weight_operations(self, names: Sequence[str], first_blob: int) -> list[Message]:
        """`decoding` to each weight, of tensors that are the program's blobs from `first_blob` on.

        The tensors of one weight lie behind those of the one before; a scale of outputs is last.
        """
        values = [stored(tensor, first_blob + at) for at, tensor in enumerate(self.tensors())]
        each = len(values) // self.products
        return [self.decoding(name, values[at * each : (at + 1) * each]) for at, name in enumerate(names)]

    def _decoded_by(
        self, kind: str, name: str, inputs: Mapping[str, Message], attributes: Mapping[str, Message] | None = None
    ) -> Message:
        return operation(kind, name, tensor_type(self.layer.float_type, self.layer.shape), inputs, attributes)

    def _float(self, array: Array) -> Array:
        return array.astype(np.float32) if self.layer.wide else array


def weight_order(values_OC: Array, shape: tuple[int, ...], length: int = 1) -> Array:
    """Values of the matrix view, one per `length` neighbouring columns, in the weight's own order of dimensions.

    [O, K / length] becomes [O, I / length] of a Linear or [O, I / length, kh, kw] of a Conv2d.
    """
    if len(shape) == 2:
        return values_OC
    _, inputs, height, width = shape
    return values_OC.reshape(-1, height, width, inputs // length).transpose(0, 3, 1, 2)
