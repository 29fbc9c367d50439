# SPDX-License-Identifier: Apache-2.0
"""A target behind one interface: what a build, a plan, a check and a listing need to know of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

from ...ground.errors import TurbopocketError
from ...quant.formats import CompressedTensor
from ...quant.ranges import Ranges
from ...quant.scheme import Scheme
from ...runtimes.arm64.cpus import PREFIX, Cpu
from ...runtimes.arm64.emulator import Emulator
from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import ComponentSpec, Manifest, RuntimeSpec
from ...runtimes.memory import MemoryFigures
from ..checkpoint.card import ModelCard
from ..families.base import LoadedModel
from ..families.graphs import Component
from ..target_options import with_emulation
from ..verify.emulated import EmulatedRuntime
from ..verify.gaps import Runtime
from .layer import NO_SCHEMES, Kind, Layer, LayerBytes, LayerUse, Stores, kind_of, schemes_of

NO_RANGES: Mapping[str, Ranges] = MappingProxyType({})
"""Of layers that were not calibrated yet."""


class Traced(Protocol):
    """A component as its target's graph, weights still dense."""

    @property
    def component(self) -> str:
        """Its name."""
        ...

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What can be compressed in it, by full layer name."""
        ...


@dataclass(frozen=True)
class GraphShare:
    """Bytes of a target's graphs beside the layers' weights: for plans that trace nothing.

    For each Linear, each Conv2d and each component, and for each value that is no layer's weight. Fitted to the traced
    graphs of `pocket-turbo` (334 layers in `int8-row`), whose sum they meet within 4 %; `form_bytes` is extra.
    """

    linear: int
    conv2d: int
    component: int
    value: int


class Target(ABC):
    """One kind of artifact.

    Attributes:
        name: as in recipes and manifests; tools: packages whose versions decide what is written.
        own_runtime: whether what runs the artifact here is what a phone runs, so that its seconds mean something.
        stores: its forms of layers.
        max_lowering_error: largest relative error of a call that counts as right, if the recipe says nothing.
        group_scale_digits: significant bits of a scale that a group of weights shares; fp16 has 11.
        tokenizer_files: names of what it ships of each tokenizer; first_tokenizer_files: of the first one beside that.
    """

    name: ClassVar[str]
    own_runtime: ClassVar[bool] = True
    stores: ClassVar[Stores[Any]]
    tools: ClassVar[tuple[str, ...]]
    max_lowering_error: ClassVar[float]
    graph_share: ClassVar[GraphShare]
    group_scale_digits: ClassVar[int] = 11
    tokenizer_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    first_tokenizer_files: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def opened(cls, options: Any) -> Self:
        """The target with these options, of its type in `TARGET_ENTRIES`."""

    def crediting(self, card: ModelCard) -> Self:
        """The target whose files name the model's author and licence, where its format has a place for them."""
        return self

    @property
    @abstractmethod
    def runtime_names(self) -> tuple[str, ...]:
        """What runs the artifact here; the one that draws what a phone shows first."""

    @abstractmethod
    def components(
        self, model: LoadedModel, sizes: Sequence[ImageSize], image_to_image: bool = False
    ) -> list[Component]:
        """The model's graphs for pictures of these sizes, with the outputs that this target ships.

        `image_to_image` adds the one that reads a first picture.
        """

    @abstractmethod
    def form_options(self, ranges: Mapping[str, Ranges] = NO_RANGES) -> Any:
        """What its options, and what layers saw (by full name), say of layers: the `options` of its forms."""

    def resolved(self, layer: str, scheme: Scheme, kind: Kind, ranges: Mapping[str, Ranges] = NO_RANGES) -> Scheme:
        """The scheme in which a layer, by its full name, is run that is to be stored so; `ranges` are what layers saw.

        A weight format that says nothing of activations becomes the scheme in which this target runs it. Any other
        scheme stays as it is.
        """
        return self.stores.resolved(scheme, kind, self.form_options(ranges), layer)

    def schemes_of(
        self,
        weights: Mapping[str, CompressedTensor],
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
        ranges: Mapping[str, Ranges] = NO_RANGES,
    ) -> dict[str, Scheme]:
        """`resolved` of each stored weight; `schemes` are the planned ones, formats for layers that they do not name.

        Raises TurbopocketError when one is of another format than the weight.
        """
        return {
            name: self.resolved(name, scheme, kind_of(weights[name].shape), ranges)
            for name, scheme in schemes_of(weights, schemes).items()
        }

    def storable(self, scheme: Scheme, kind: Kind, shape: tuple[int, ...]) -> str | None:
        """None when a layer of this kind and shape stays compressed, and is run, in that scheme; else the reason."""
        return self.stores.storable(scheme, kind, shape, self.form_options())

    def stored_as(self, scheme: Scheme, kind: Kind) -> str:
        """The operators that read a weight, and round activations, in a storable scheme."""
        return self.stores.stored_as(scheme, kind, self.form_options())

    @abstractmethod
    def trace(self, component: Component) -> Traced:
        """The component's graph."""

    @abstractmethod
    def component_spec(self, traced: Any) -> ComponentSpec:
        """What a manifest says of it."""

    @abstractmethod
    def runtime_spec(self) -> RuntimeSpec:
        """What a manifest says of the runtime that opens its files."""

    @abstractmethod
    def fixed_bytes(self, traced: Any, candidates: Mapping[str, Iterable[Scheme]]) -> int:
        """Bytes of its files beside the layers' own, at most, when each layer gets one of its candidates."""

    def layer_memory(self, layer: Layer, scheme: Scheme, use: LayerUse) -> LayerBytes:
        """What the layer takes of memory in that scheme.

        Raises TurbopocketError with `storable`'s reason when it can not be stored so.
        """
        return self.stores.form_of(layer, scheme, self.form_options()).memory(use)

    def component_memory(self, operators: float, norms: int, others: int, others_bytes: int, table_bytes: int) -> int:
        """Bytes of memory that a component takes while it is open beside its layers: for plans that open nothing.

        Of so many operators in PyTorch and GroupNorms, and `others` tensors that are no layer's weight, in fp32, of
        which tables are only looked up: few of their rows are ever read.
        """
        return others_bytes - table_bytes

    def form_bytes(self, layer: Layer, schemes: Iterable[Scheme]) -> int:
        """Bytes beside the layer's weight in the wordiest of these schemes; 0 where `graph_share` has them."""
        return 0

    @abstractmethod
    def lowered_bytes(self, traced: Any, schemes: Mapping[str, Scheme]) -> int:
        """Bytes of its files with the layers in these schemes; never less than they come to."""

    def fitted(self, traced: Any, component: Component, ranges: Mapping[str, Ranges]) -> Traced:
        """The graph again, for layers that see such numbers (by full name); the same by default."""
        return traced

    @abstractmethod
    def lower(
        self,
        traced: Any,
        weights: Mapping[str, CompressedTensor],
        folder: Path,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> ComponentSpec:
        """Writes its files under `folder`, and says what they are.

        `schemes` are those of the plan; a layer that they do not name has its weight's format, `resolved`.
        """

    def as_run(
        self,
        component: Component,
        weights: Mapping[str, CompressedTensor],
        ranges: Mapping[str, Ranges],
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> Component:
        """The component, given the stored weights, as the runtimes are to compute it: what they are compared with.

        `schemes` are as in `lower`, `ranges` what the layers saw.

        By default itself: all that lowering changes is the program. A target that also rounds activations by design
        gives a component that does.
        """
        return component

    @abstractmethod
    def write_side_files(
        self, model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path
    ) -> None:
        """Writes configs and tokenizers; `size` is the default of the pictures."""

    @abstractmethod
    def files(self, spec: ComponentSpec) -> list[str]:
        """Paths of the files that `lower` writes for a component."""

    def lowering_limit(self, schemes: Mapping[str, Scheme]) -> float:
        """What `max_lowering_error` is for layers in these schemes, as `schemes_of` gives them."""
        return self.max_lowering_error

    @abstractmethod
    def runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        """One for each of `runtime_names`; `weights` are the stored ones, by which layers may be found again.

        `schemes` are as in `lower`.
        """

    def kernel_runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        """The same with the kernels of `make kernels`, for artifacts that have work for them.

        `check` measures these too; `build` does not, so that an artifact is the same with and without them.
        """
        return {}

    def emulated(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        cpu: Cpu,
        emulator: Emulator,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> EmulatedRuntime:
        """The artifact on an emulated CPU. Raises TurbopocketError where that CPU does not run such artifacts."""
        raise TurbopocketError(
            f"{self.name} artifacts do not run on {PREFIX}{cpu.name}; those for {' and '.join(with_emulation())} do"
        )

    def inspect(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        """What only a device can tell. Raises TurbopocketError for files that no device would accept."""
        return ()

    def notes(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        """What a person should know of how the artifact ran on this machine, a line each."""
        return ()

    @property
    def not_in_plan(self) -> str | None:
        """What the options add to the files that no plan counts, and what to do about it; None when nothing is."""
        return None

    @abstractmethod
    def memory(self, folder: Path, component: str) -> MemoryFigures | None:
        """Measured memory of one component, None where only a device can tell."""
