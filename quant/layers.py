# SPDX-License-Identifier: Apache-2.0
"""What a layer is."""

from torch import Tensor, nn

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


def convolved_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Rows, or columns, that a convolution gives for so many; `padding` is that of one side, both have it."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
