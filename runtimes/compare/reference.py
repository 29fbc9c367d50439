# SPDX-License-Identifier: Apache-2.0
"""PyTorch as a runner: what every other runtime is compared with. The only file here that imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...ground.arrays import Arrays, check_names
from ...ground.errors import TurbopocketError
from ...ground.heap import give_back_freed


@dataclass(frozen=True)
class TorchComponent:
    """A module from positional tensors to a tensor or a tuple of them, with names for both ends.

    `layer_prefix` is what the module's own paths have in front of the layer names people use (`unet.` when
    the module wraps a UNet as its attribute `unet`); layers outside it are not shown.
    """

    module: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    layer_prefix: str = ""


class PyTorchRunner:
    """Runs modules in inference mode on the CPU, behind the interface of every runtime.

    What one component freed is given back before another runs: a decoder's activations come on top of it otherwise.
    """

    def __init__(self, components: Mapping[str, TorchComponent]) -> None:
        self.components = components
        self._last: str | None = None

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError for an unknown component or input."""
        torch_component = self._component(component)
        check_names(component, "inputs", torch_component.input_names, list(inputs))
        tensors = [torch.from_numpy(inputs[name]) for name in torch_component.input_names]
        if self._last not in (None, component):
            give_back_freed()
        self._last = component
        with torch.inference_mode():
            outputs = torch_component.module(*tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return {name: output.numpy() for name, output in zip(torch_component.output_names, outputs, strict=True)}

    def layers(self, component: str) -> list[str]:
        """Paths of the modules that hold weights themselves, as registered (execution may differ)."""
        return list(self._layers(self._component(component)))

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of layers in execution order; a layer that runs twice shows its last output."""
        known = self._layers(self._component(component))
        with _recorded({layer: known[layer] for layer in layers if layer in known}) as outputs:
            self.run(component, inputs)
        return {layer: output.numpy() for layer, output in outputs.items()}

    def run_following(
        self, component: str, inputs: Mapping[str, NDArray[Any]], followed: Mapping[str, NDArray[Any]]
    ) -> tuple[Arrays, Arrays]:
        """Outputs of the component and of the layers; each layer in `followed` hands on that value, not its own.

        A value of another shape than the layer's output is not handed on.
        """
        known = self._layers(self._component(component))
        given = {known[layer]: value for layer, value in followed.items() if layer in known}

        def replaced(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            value = given[module]
            return torch.from_numpy(value.copy()) if value.shape == output.shape else None

        with _recorded({layer: known[layer] for layer in followed if layer in known}) as own:
            hooks = [module.register_forward_hook(replaced) for module in given]
            try:
                outputs = self.run(component, inputs)
            finally:
                for hook in hooks:
                    hook.remove()
        return outputs, {layer: output.numpy() for layer, output in own.items()}

    def _component(self, component: str) -> TorchComponent:
        if component not in self.components:
            raise TurbopocketError(f"no component {component!r}: there are {', '.join(self.components)}")
        return self.components[component]

    @staticmethod
    def _layers(component: TorchComponent) -> dict[str, nn.Module]:
        return {
            path.removeprefix(component.layer_prefix): module
            for path, module in component.module.named_modules()
            if path.startswith(component.layer_prefix) and any(True for _ in module.parameters(recurse=False))
        }


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that fills with the layers' outputs, in the order they run, while the context is open."""
    outputs: dict[str, Tensor] = {}

    def record(layer: str) -> Any:
        # a copy, since what follows may write into the layer's output
        return lambda module, arguments, output: outputs.update({layer: output.clone()})

    hooks = [module.register_forward_hook(record(layer)) for layer, module in layers.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
