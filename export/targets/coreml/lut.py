# SPDX-License-Identifier: Apache-2.0
"""Lookup tables in ML programs: palettes of single values, and codebooks of short vectors with a scale per output.

O outputs, I inputs, K columns of the matrix view, D length of a vector, G tables, P entries of one.
"""

import math
from collections.abc import Sequence

import numpy as np

from ....ground.bits import pack_bits
from ....quant.formats import Additive, Codebook, CompressedTensor, Palette
from ....runtimes.coreml.file.dtypes import TensorType
from ...target_options import Deployment
from .form import Array, Form, weight_order
from .mil import Message, ints, tensor_type

_IOS17_BITS = (1, 2, 4, 6, 8)


class PaletteForm(Form):
    """A table of single values for all outputs, or for every group of outputs."""

    summary = "constexpr_lut_to_dense"

    @classmethod
    def refusal(cls, format: Palette, shape: tuple[int, ...], options: Deployment) -> str | None:
        if options != "iOS17":
            return None
        if format.rows is None and format.bits in _IOS17_BITS:
            return None
        return f"iOS17 stores palettes of 1, 2, 4, 6 or 8 bits with one table, not {format}: that takes iOS18"

    def tensors(self) -> list[TensorType]:
        shape, bits, entries = self.layer.shape, self.format.bits, 2**self.format.bits
        if self.deployment == "iOS17":
            packed = -(-math.prod(shape) * bits // 8)
            return [tensor_type("UINT8", (packed,)), tensor_type(self.layer.float_type, (entries,))]
        tables = shape[0] // (self.format.rows or shape[0])
        table_shape = (tables, *(1 for _ in shape[1:]), entries, 1)
        return [tensor_type(f"UINT{bits}", shape), tensor_type(self.layer.float_type, table_shape)]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        codes_OK, table_GP = self.format.unpack(weight)
        codes = weight_order(codes_OK.numpy(), self.layer.shape)
        if self.deployment == "iOS17":
            codes = pack_bits(codes, self.format.bits)
        _, table = self.tensors()
        return [codes, self._float(table_GP.numpy()).reshape(table.shape)]

    def decoding(self, name: str, values: Sequence[Message]) -> Message:
        parameters = dict(zip(("indices", "lut"), values, strict=True))
        if self.deployment == "iOS17":
            parameters["shape"] = ints(self.layer.shape, "UINT32")
            return self._decoded_by("constexpr_lut_to_dense", name, {}, parameters)
        return self._decoded_by("constexpr_lut_to_dense", name, parameters)


class _VectorForm(Form):
    """Tables of vectors; the row's scale multiplies the layer's output.

    Systems before iOS26 scale before the lookup only, hence the output. So that the output before its scale is no
    larger than an fp16 weight's would be, a power of two moves from the scales to the table: exact, but for table
    entries that become subnormal, which are rounded to steps of 2^-24.
    """

    scales_outputs = True

    @classmethod
    def refusal(cls, format: Codebook | Additive, shape: tuple[int, ...], options: Deployment) -> str | None:
        return "iOS17 has no tables of vectors: that takes iOS18" if options == "iOS17" else None

    def tensors(self) -> list[TensorType]:
        shape, length = self.layer.shape, self.format.length
        codes_shape = list(shape)
        codes_shape[self._axis] //= length
        table_shape = (self._tables, *(1 for _ in shape[1:]), 2**self.format.bits, length)
        scale_shape = shape[:1] if len(shape) == 2 else (1, shape[0], 1, 1)
        codes, table = (
            tensor_type(f"UINT{self.format.bits}", codes_shape),
            tensor_type(self.layer.float_type, table_shape),
        )
        return [*(codes, table) * self.products, tensor_type(self.layer.float_type, scale_shape)]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        codes, codebooks, scale_O = (part.numpy() for part in self.format.unpack(weight))
        planes = codes.reshape(self.products, *codes.shape[-2:])
        exponent = math.frexp(float(np.abs(scale_O).max()))[1]
        scaled = np.ldexp(self._float(codebooks), exponent)
        _, table, *_, scale = self.tensors()
        tables = scaled.reshape(self.products, *table.shape)
        columns = 1 if self._axis == 0 else self.format.length
        pairs = [(weight_order(plane, self.layer.shape, columns), tables[at]) for at, plane in enumerate(planes)]
        return [
            *(array for pair in pairs for array in pair),
            np.ldexp(self._float(scale_O), -exponent).reshape(scale.shape),
        ]

    def decoding(self, name: str, values: Sequence[Message]) -> Message:
        codes, table, *_ = values
        inputs = {"indices": codes, "lut": table, "vector_axis": ints(self._axis)}
        return self._decoded_by("constexpr_lut_to_dense", name, inputs)

    @property
    def _axis(self) -> int:
        return 1

    @property
    def _tables(self) -> int:
        return 1


class CodebookForm(_VectorForm):
    """A table of vectors along the input or the output channels, or one for every group of outputs."""

    summary = "constexpr_lut_to_dense, mul"

    @property
    def _axis(self) -> int:
        return 0 if self.format.along_outputs else 1

    @property
    def _tables(self) -> int:
        return int(self.layer.shape[0] // (self.format.rows or self.layer.shape[0]))


class AdditiveForm(_VectorForm):
    """A sum of vectors as a sum of products: Core ML looks a weight up once, so each codebook has a weight of its own.

    That multiplies the layer's work; one codebook of shorter vectors (`vq8-d4` for `avq2x8-d8`) has as many bits and
    does not.
    """

    summary = "constexpr_lut_to_dense and a product for each codebook, add, mul"

    @classmethod
    def refusal(cls, format: Codebook | Additive, shape: tuple[int, ...], options: Deployment) -> str | None:
        if format.shared_parts:
            return f"a Core ML weight has a table of its own, {format} has one for all layers"
        return super().refusal(format, shape, options)

    @property
    def products(self) -> int:
        return int(self.format.count)
