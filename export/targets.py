# SPDX-License-Identifier: Apache-2.0
"""The targets behind one interface: what a build, a plan, a check and a listing need to know of each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..quant.formats import CompressedTensor, LayerFormat
from ..runtimes.manifest import ComponentSpec, Manifest
from ..runtimes.memory import MemoryFigures
from ..runtimes.memory import measure as measure_memory
from ..runtimes.parity import Limits
from ..runtimes.runner import open_runner
from .components import components_of
from .families import LoadedModel
from .graph import Component
from .lower import onnx
from .lower.onnx_form import Kind
from .lower.onnx_stores import STORES
from .parity import Runtime
from .recipe import TargetSection
from .side_files import write_side_files


class Traced(Protocol):
    """A component as its target's graph, weights still dense."""

    @property
    def component(self) -> str:
        """Its name."""
        ...

    @property
    def layers(self) -> Mapping[str, Any]:
        """What can be compressed in it, by full layer name."""
        ...


class Target(ABC):
    """One kind of artifact.

    Attributes:
        name: as in recipes and manifests; tools: packages whose versions decide what is written.
        max_lowering_error: largest relative error of a call that counts as right, if the recipe says nothing.
        runtime_names: what runs the artifact here; the one that draws what a phone shows first.
    """

    name: ClassVar[str]
    tools: ClassVar[tuple[str, ...]]
    max_lowering_error: ClassVar[float]
    runtime_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def components(self, model: LoadedModel) -> list[Component]:
        """The model's graphs with the outputs that this target ships."""

    @abstractmethod
    def storable(self, format: LayerFormat, kind: Kind, shape: tuple[int, ...]) -> str | None:
        """None when a layer of this kind and shape stays compressed in that format, else the reason."""

    @abstractmethod
    def stored_as(self, format: LayerFormat, kind: Kind) -> str:
        """The operators that read a weight in a storable format."""

    @abstractmethod
    def trace(self, component: Component) -> Traced:
        """The component's graph."""

    @abstractmethod
    def component_spec(self, traced: Any) -> ComponentSpec:
        """What a manifest says of it."""

    @abstractmethod
    def fixed_bytes(self, traced: Any) -> int:
        """Bytes of its files beside the layers' own, at most."""

    @abstractmethod
    def lowered_bytes(self, traced: Any, formats: Mapping[str, LayerFormat]) -> int:
        """Bytes of its files with the layers in these formats; never less than they come to."""

    @abstractmethod
    def lower(self, traced: Any, weights: Mapping[str, CompressedTensor], folder: Path) -> None:
        """Writes its files under `folder`."""

    @abstractmethod
    def write_side_files(self, model: LoadedModel, components: Mapping[str, Any], folder: Path) -> None:
        """Writes configs and tokenizers."""

    @abstractmethod
    def files(self, spec: ComponentSpec) -> list[str]:
        """Paths of the files that `lower` writes for a component."""

    @abstractmethod
    def runtimes(self, folder: Path, manifest: Manifest, max_lowering_error: float) -> dict[str, Runtime]:
        """One for each of `runtime_names`."""

    @abstractmethod
    def memory(self, folder: Path, component: str) -> MemoryFigures | None:
        """Measured memory of one component, None where only a device can tell."""


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX Runtime."""

    options: onnx.OnnxOptions = onnx.DEFAULTS
    name = "onnx"
    tools = ("onnx", "onnxruntime")
    max_lowering_error = 1e-4
    runtime_names = ("onnxruntime",)

    def components(self, model: LoadedModel) -> list[Component]:
        return components_of(model)

    def storable(self, format: LayerFormat, kind: Kind, shape: tuple[int, ...]) -> str | None:
        return onnx.storable(format, kind, shape)

    def stored_as(self, format: LayerFormat, kind: Kind) -> str:
        return STORES[type(format), kind].summary

    def trace(self, component: Component) -> onnx.TracedGraph:
        return onnx.trace(component)

    def component_spec(self, traced: onnx.TracedGraph) -> ComponentSpec:
        return onnx.component_spec(traced)

    def fixed_bytes(self, traced: onnx.TracedGraph) -> int:
        return onnx.fixed_bytes(traced)

    def lowered_bytes(self, traced: onnx.TracedGraph, formats: Mapping[str, LayerFormat]) -> int:
        return onnx.lowered_bytes(traced, formats)

    def lower(self, traced: onnx.TracedGraph, weights: Mapping[str, CompressedTensor], folder: Path) -> None:
        onnx.lower(traced, weights, folder, self.options)

    def write_side_files(self, model: LoadedModel, components: Mapping[str, Any], folder: Path) -> None:
        write_side_files(model, components, folder)

    def files(self, spec: ComponentSpec) -> list[str]:
        return [spec.file, f"{spec.file}.data"]

    def runtimes(self, folder: Path, manifest: Manifest, max_lowering_error: float) -> dict[str, Runtime]:
        return {
            self.runtime_names[0]: Runtime(open_runner(folder, manifest), Limits(max_relative_error=max_lowering_error))
        }

    def memory(self, folder: Path, component: str) -> MemoryFigures:
        return measure_memory(folder, component)


def open_target(section: TargetSection) -> Target:
    """Returns the target that a recipe asks for."""
    return Onnx(onnx.OnnxOptions(section.accuracy_level, section.prepacked))
