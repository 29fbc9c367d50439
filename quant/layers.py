# SPDX-License-Identifier: Apache-2.0
"""What a layer is."""

from torch import Tensor, nn
from torch.nn import functional

from ..ground.errors import TurbopocketError
from ..ground.names import LayerName


def compressible_layers(component: str, module: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and every Conv2d with groups = 1, by name: `<component>.<module path>`."""
    return {
        str(LayerName(component, path)): layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def weight_of(name: str, layer: nn.Module) -> Tensor:
    """The weight of a compressible layer; TurbopocketError naming any other module."""
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
        return layer.weight
    raise TurbopocketError(f"{name}: {type(layer).__name__} is not a Linear or a Conv2d with groups=1")


def output_without_bias(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What a Linear or Conv2d makes of `x` with another weight of its shape, and without its bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, None)
    return functional.linear(x, weight)
