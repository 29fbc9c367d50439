# SPDX-License-Identifier: Apache-2.0
"""A target behind one interface: what a build, a plan, a check and a listing need to know of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from ..quant.formats import CompressedTensor, LayerFormat
from ..runtimes.arm64.cpus import PREFIX, Cpu
from ..runtimes.arm64.emulator import Emulator
from ..runtimes.errors import TurbopocketError
from ..runtimes.manifest import ComponentSpec, Manifest
from ..runtimes.memory import MemoryFigures
from .emulated import EmulatedRuntime
from .families import LoadedModel
from .graph import Component
from .parity import Runtime

Kind = Literal["linear", "conv2d"]


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
    """

    name: ClassVar[str]
    tools: ClassVar[tuple[str, ...]]
    max_lowering_error: ClassVar[float]

    @property
    @abstractmethod
    def runtime_names(self) -> tuple[str, ...]:
        """What runs the artifact here; the one that draws what a phone shows first."""

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

    def fitted(self, traced: Any, component: Component, largest_outputs: Mapping[str, float]) -> Traced:
        """The graph again, for layers whose outputs reach these magnitudes (by full name); the same by default."""
        return traced

    @abstractmethod
    def lower(self, traced: Any, weights: Mapping[str, CompressedTensor], folder: Path) -> ComponentSpec:
        """Writes its files under `folder`, and says what they are."""

    @abstractmethod
    def write_side_files(self, model: LoadedModel, components: Mapping[str, Any], folder: Path) -> None:
        """Writes configs and tokenizers."""

    @abstractmethod
    def files(self, spec: ComponentSpec) -> list[str]:
        """Paths of the files that `lower` writes for a component."""

    @abstractmethod
    def runtimes(self, folder: Path, manifest: Manifest, max_lowering_error: float) -> dict[str, Runtime]:
        """One for each of `runtime_names`."""

    def kernel_runtimes(self, folder: Path, manifest: Manifest, max_lowering_error: float) -> dict[str, Runtime]:
        """The same with the kernels of `make kernels`, for artifacts that have work for them.

        `check` measures these too; `build` does not, so that an artifact is the same with and without them.
        """
        return {}

    def emulated(self, folder: Path, manifest: Manifest, cpu: Cpu, emulator: Emulator) -> EmulatedRuntime:
        """The artifact on an emulated CPU. Raises TurbopocketError where that CPU does not run such artifacts."""
        raise TurbopocketError(f"{self.name} artifacts do not run on {PREFIX}{cpu.name}; those for onnx do")

    def inspect(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        """What only a device can tell. Raises TurbopocketError for files that no device would accept."""
        return ()

    @abstractmethod
    def memory(self, folder: Path, component: str) -> MemoryFigures | None:
        """Measured memory of one component, None where only a device can tell."""
