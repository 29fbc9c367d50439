# SPDX-License-Identifier: Apache-2.0
"""Integer and plain fp16 weights in ML programs."""

from collections.abc import Sequence

from ....quant.formats import Affine, CompressedTensor, Dense
from ....runtimes.coreml.file.dtypes import TensorType
from ...target_options import Deployment
from .form import Array, Form, weight_order
from .mil import Message, const, ints, string, tensor_type


class DenseForm(Form):
    """fp16 as it is; a layer that computes in fp32 reads it through `constexpr_cast`."""

    summary = "fp16 weights"

    @classmethod
    def refusal(cls, format: Dense, shape: tuple[int, ...], options: Deployment) -> str | None:
        return "Core ML programs here compute in fp16: fp32 weights would be rounded" if format.bits == 32 else None

    def tensors(self) -> list[TensorType]:
        return [tensor_type("FLOAT16", self.layer.shape)]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        return [weight.parts["weight"].numpy()]

    def decoding(self, name: str, values: Sequence[Message]) -> Message:
        if not self.layer.wide:
            return const(name, values[0])
        source = {"source_val": values[0]}
        if self.deployment == "iOS17":
            return self._decoded_by("constexpr_cast", name, {}, {**source, "output_dtype": string("fp32")})
        return self._decoded_by("constexpr_cast", name, {**source, "output_dtype": string("fp32")})


class AffineForm(Form):
    """scale * (code - offset) per row or group, computed by Core ML from the stored codes."""

    summary = "constexpr_blockwise_shift_scale"

    @classmethod
    def refusal(cls, format: Affine, shape: tuple[int, ...], options: Deployment) -> str | None:
        if options != "iOS17":
            return None
        if format.bits == 8 and format.group is None:
            return None
        return f"iOS17 stores 8-bit integers with one scale per row, not {format}: that takes iOS18"

    def tensors(self) -> list[TensorType]:
        codes = f"{'' if self.format.symmetric else 'U'}INT{self.format.bits}"
        scale_shape = self._scale_shape()
        tensors = [tensor_type(codes, self.layer.shape), tensor_type(self.layer.float_type, scale_shape)]
        return tensors if self.format.symmetric else [*tensors, tensor_type(codes, scale_shape)]

    def arrays(self, weight: CompressedTensor) -> list[Array]:
        codes_OK, scale_OG, zero_OG = self.format.unpack(weight)
        shape = self.layer.shape
        arrays = [weight_order(codes_OK.numpy(), shape), self._float(self._scales(scale_OG.numpy()))]
        return arrays if zero_OG is None else [*arrays, self._scales(zero_OG.numpy())]

    def decoding(self, name: str, values: Sequence[Message]) -> Message:
        if self.deployment == "iOS17":
            zero = ints(0, "INT8") if self.format.symmetric else values[2]
            parameters = {"quantized_data": values[0], "scale": values[1], "zero_point": zero, "axis": ints(0)}
            return self._decoded_by("constexpr_affine_dequantize", name, {}, parameters)
        parameters = dict(zip(("data", "scale", "offset"), values, strict=False))
        return self._decoded_by("constexpr_blockwise_shift_scale", name, parameters)

    def _scale_shape(self) -> tuple[int, ...]:
        """One scale per row, [O, 1, 1, 1]; or per group of input channels at one tap, [O, I / g, kh, kw]."""
        shape, group = self.layer.shape, self.format.group
        if self.deployment == "iOS17":
            return shape[:1]
        if group is None:
            return (shape[0], *(1 for _ in shape[1:]))
        return (shape[0], shape[1] // group, *shape[2:])

    def _scales(self, values_OG: Array) -> Array:
        if self.format.group is None:
            return values_OG.reshape(self._scale_shape())
        return weight_order(values_OG, self.layer.shape, self.format.group)
