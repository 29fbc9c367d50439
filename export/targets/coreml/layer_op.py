# SPDX-License-Identifier: Apache-2.0
"""Linear and Conv2d layers as operators of our own, in PyTorch and in coremltools, that never see a weight.

While the model is traced every such call becomes `turbopocket_coreml::layer`, which returns zeros of the right shape.
coremltools then converts a program whose only tensors are biases, norms and embeddings: no pass can fold, merge or
round a weight, memory does not grow with the model, and each layer is one operator that carries its module path.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import coremltools as ct
import torch
import torch.nn.functional as F
from coremltools.converters.mil.mil import Builder, Operation, types
from coremltools.converters.mil.mil.input_type import DefaultInputs, InputSpec, TensorInputType
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ....ground.errors import TurbopocketError
from ....quant.layers import convolved_size

TORCH_KIND = "turbopocket_coreml::layer"

_LIBRARY = torch.library.Library("turbopocket_coreml", "DEF")
_LIBRARY.define("layer(Tensor x, Tensor? bias, str path, int[] weight_shape, int[] geometry) -> Tensor")


def output_shape(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: tuple[int, ...]) -> list[int]:
    """Shape of a layer's output; `geometry` is empty for a Linear, else strides, paddings and dilations (h, w each)."""
    if not geometry:
        return [*x_shape[:-1], weight_shape[0]]
    spatial = [convolved_size(x_shape[2 + axis], weight_shape[2 + axis], *geometry[axis::2]) for axis in (0, 1)]
    return [x_shape[0], weight_shape[0], *spatial]


def _zeros(x: Tensor, bias: Tensor | None, path: str, weight_shape: list[int], geometry: list[int]) -> Tensor:
    return x.new_zeros(output_shape(tuple(x.shape), tuple(weight_shape), tuple(geometry)))


_LIBRARY.impl("layer", _zeros, "CompositeExplicitAutograd")


class _Intercept(TorchFunctionMode):
    """Turns calls of F.linear and F.conv2d with a known weight into layers."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        super().__init__()
        self.paths = paths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = self.paths.get(id(args[1])) if func in (F.linear, F.conv2d) and len(args) > 1 else None
        if path is None:
            return func(*args, **(kwargs or {}))
        return _linear(path, *args) if func is F.linear else _conv2d(path, *args)


def _linear(path: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.ndim > 3:
        raise TurbopocketError(
            f"{path}: Core ML applies a Linear to at most 3 dimensions, found {[int(n) for n in x.shape]}"
        )
    return torch.ops.turbopocket_coreml.layer(x, bias, path, list(weight.shape), [])


def _conv2d(
    path: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    if groups != 1:
        raise TurbopocketError(f"{path}: a Conv2d of {groups} groups has no compressed form for Core ML, only of 1")
    return torch.ops.turbopocket_coreml.layer(x, bias, path, list(weight.shape), [*stride, *padding, *dilation])


@contextmanager
def layers_intercepted(path_by_weight: Mapping[int, str]) -> Iterator[None]:
    """While the block runs, a Linear or Conv2d whose weight's `id` is known is called as a layer of that path."""
    with _Intercept(path_by_weight):
        yield


@SSAOpRegistry.register_op(opset_version=ct.target.iOS15)
class turbopocket_layer(Operation):  # noqa: N801  coremltools takes the operator's type from the class's name
    """A Linear or Conv2d without its weight: `coreml_trace.LAYER` in the converted program."""

    input_spec = InputSpec(
        x=TensorInputType(type_domain="T"),
        bias=TensorInputType(const=True, optional=True, type_domain="T"),
        path=TensorInputType(const=True, type_domain=types.str),
        weight_shape=TensorInputType(const=True, type_domain=types.int32),
        geometry=TensorInputType(const=True, optional=True, type_domain=types.int32),
    )
    type_domains: ClassVar = {"T": (types.fp16, types.fp32)}

    def default_inputs(self) -> DefaultInputs:
        return DefaultInputs(bias=None, geometry=None)

    def type_inference(self) -> Any:
        geometry = () if self.geometry is None else tuple(self.geometry.val)
        return types.tensor(self.x.dtype, output_shape(self.x.shape, tuple(self.weight_shape.val), geometry))


def translate_layer(context: Any, node: Any) -> None:
    """coremltools' translation of `turbopocket_coreml::layer`."""
    x, bias, path, weight_shape, geometry = (context[name] for name in node.inputs)
    given = {"bias": bias} if bias is not None else {}
    if len(geometry.val):
        given["geometry"] = geometry.val
    context.add(Builder.turbopocket_layer(x=x, path=path.val, weight_shape=weight_shape.val, name=node.name, **given))
