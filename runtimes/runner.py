# SPDX-License-Identifier: Apache-2.0
"""What every runtime looks like from outside: named arrays in, named arrays out."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from ..ground.arrays import Arrays, check_names
from ..ground.errors import TurbopocketError
from .manifest import ComponentSpec, Manifest, TensorSpec


class Runner(Protocol):
    """Runs the components of one model."""

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name. Raises TurbopocketError for unknown components or unfit inputs."""
        ...


class LayerRunner(Runner, Protocol):
    """A runner that can also show what single layers computed."""

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of layers by PyTorch module path, in execution order; layers it cannot see are left out."""
        ...


def component_spec(manifest: Manifest, component: str) -> ComponentSpec:
    """The spec of a component. Raises TurbopocketError listing the components when there is no such one."""
    try:
        return manifest.components[component]
    except KeyError:
        known = ", ".join(manifest.components)
        raise TurbopocketError(f"{manifest.name} has no component {component!r}: it has {known}") from None


def one_by_one(specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> list[Arrays]:
    """The calls, of one item each, that a call of several comes to for a graph whose batch is fixed at 1.

    Inputs without dimensions go into each. Where nothing has more than one item it is the one call as it is.
    """
    batched = {spec.name for spec in specs if spec.shape[:1] == [1] and spec.name in inputs and inputs[spec.name].ndim}
    count = max((len(inputs[name]) for name in batched), default=1)
    if count < 2:
        return [dict(inputs)]
    own = {name for name in batched if len(inputs[name]) == count}
    return [{name: v[at : at + 1] if name in own else v for name, v in inputs.items()} for at in range(count)]


def check_inputs(component: str, specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Returns when `inputs` are exactly the specified tensors; a named dimension has one size in all of them.

    Raises TurbopocketError naming the component and the first tensor that does not fit.
    """
    check_names(component, "inputs", [spec.name for spec in specs], list(inputs))
    sizes: dict[str, int] = {}
    for spec in specs:
        found = inputs[spec.name]
        expected = f"{component}: input {spec.name} must be {spec.dtype} {spec.shape}"
        if found.dtype.name != spec.dtype or found.ndim != len(spec.shape):
            raise TurbopocketError(f"{expected}, found {found.dtype.name} {list(found.shape)}")
        for dimension, size in zip(spec.shape, found.shape, strict=True):
            wanted = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            if size != wanted:
                raise TurbopocketError(f"{expected}, found {list(found.shape)}: {dimension} is {wanted}, not {size}")
