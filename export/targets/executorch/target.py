# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch programs whose layers XNNPACK runs, as a target."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from ....quant.formats import CompressedTensor
from ....quant.ranges import Ranges
from ....quant.scheme import Scheme
from ....runtimes.arm64.cpus import Cpu
from ....runtimes.arm64.emulator import Emulator
from ....runtimes.compare.rows import Limits
from ....runtimes.executorch.native.memory import measure_program
from ....runtimes.executorch.native.runner import EmulatedExecuTorchRunner
from ....runtimes.executorch.runner import ExecuTorchRunner
from ....runtimes.image_size import ImageSize
from ....runtimes.manifest import ComponentSpec, Manifest, RuntimeSpec
from ....runtimes.memory import MemoryFigures
from ...families.base import LoadedModel
from ...families.components import components_of
from ...families.graphs import Component
from ...target_options import TARGET_ENTRIES, ExecuTorchOptions
from ...verify.emulated import ORDER_OF_SUMS, EmulatedRuntime
from ...verify.gaps import Runtime
from ..base import NO_RANGES, GraphShare, Target
from ..layer import NO_SCHEMES, Layer
from ..side_files import write_tokenizers
from . import program as executorch
from .form import DEFAULTS, FormOptions
from .integer import GROUP_SCALE_DIGITS
from .stores import STORES

FLOAT_ERROR = 1e-4
"""Where no activation is rounded, all that differs is the order of sums."""

LAYER_ERROR = 5e-3
"""Of a layer that rounds its input, on equal inputs, where a code or the zero of a row is rounded the other way.

Most layers of `pocket-turbo` are 1e-7 to 2e-6 from PyTorch. The worst of 264 layers in 16 calls of the UNet was 2.0e-3
(of 16 rows), of the VAE decoder 7.5e-4; a row of other codes is as far off as rounding itself, about 1e-2.
"""
STATIC_LAYER_ERROR = 1.5e-2
"""Of a layer that rounds its output as well: one rounded the other way is a whole step, 0.02 to 0.13 of what is usual.

Half of the layers of an earlier student were equal to the last bit, and no output was more than one step off. The
worst layer of `pocket-turbo` in 4 pictures was 9.2e-3 from PyTorch; of `pocket`, 1.03e-2 (both of the VAE decoder).
"""
WHOLE_ERROR = 3e-2
"""Of a whole component that rounds, between two CPUs, and never more than compression itself changed it: a flip makes
others, and after a few layers all codes differ.

PyTorch against itself, inputs moved by 1e-6 to 1e-5 of their size: 0.9e-2 (VAE decoder), 0.85e-2 to 0.96e-2 (UNet); the
programs against PyTorch: 0.6e-2 to 0.9e-2 (UNet), 0.9e-2 to 2.5e-2 (VAE decoder, of latents that are pure noise).
"""
STATIC_WHOLE_ERROR = 4e-2
"""The same where outputs are rounded as well, which is coarser. Found: no difference at all, or 3.0e-2 after one output
was rounded the other way (UNet of `pocket`); `pocket-turbo`'s from itself, steps changed in the sixth decimal: 3.1e-2.
"""


@dataclass(frozen=True)
class ExecuTorch(Target):
    """ExecuTorch with XNNPACK.

    Options that say how activations are rounded are for formats that say nothing of it; schemes that do are taken at
    their word.
    """

    options: ExecuTorchOptions = DEFAULTS

    name = "executorch"
    stores = STORES
    tools = ("executorch",)
    max_lowering_error = LAYER_ERROR
    runtime_names = ("executorch",)
    graph_share = GraphShare(linear=1285, conv2d=1285, component=4_100, value=4)
    group_scale_digits = GROUP_SCALE_DIGITS

    def components(
        self, model: LoadedModel, sizes: Sequence[ImageSize], image_to_image: bool = False
    ) -> list[Component]:
        return components_of(model, sizes, all_states=False, image_to_image=image_to_image)

    @classmethod
    def opened(cls, options: ExecuTorchOptions) -> Self:
        return cls(options)

    def form_options(self, ranges: Mapping[str, Ranges] = NO_RANGES) -> FormOptions:
        return FormOptions(self.options, ranges)

    def trace(self, component: Component) -> executorch.TracedProgram:
        return executorch.trace(component, self.options)

    def fitted(
        self, traced: executorch.TracedProgram, component: Component, ranges: Mapping[str, Ranges]
    ) -> executorch.TracedProgram:
        return replace(traced, ranges={name: ranges[name] for name in traced.layers if name in ranges})

    def component_spec(self, traced: executorch.TracedProgram) -> ComponentSpec:
        return executorch.component_spec(traced)

    def runtime_spec(self) -> RuntimeSpec:
        version = metadata.version(self.tools[0])  # no other was tried
        return RuntimeSpec(name=TARGET_ENTRIES[self.name].title, oldest=version, providers=["XnnpackBackend"])

    def fixed_bytes(self, traced: executorch.TracedProgram, candidates: Mapping[str, Iterable[Scheme]]) -> int:
        return executorch.fixed_bytes(traced, candidates)

    def form_bytes(self, layer: Layer, schemes: Iterable[Scheme]) -> int:
        return executorch.form_bytes(layer, schemes, self.form_options())

    def lowered_bytes(self, traced: executorch.TracedProgram, schemes: Mapping[str, Scheme]) -> int:
        return executorch.lowered_bytes(traced, schemes)

    def lower(
        self,
        traced: executorch.TracedProgram,
        weights: Mapping[str, CompressedTensor],
        folder: Path,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> ComponentSpec:
        return executorch.lower(traced, weights, folder, schemes)

    def as_run(
        self,
        component: Component,
        weights: Mapping[str, CompressedTensor],
        ranges: Mapping[str, Ranges],
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> Component:
        return executorch.as_run(component, weights, self.form_options(ranges), schemes)

    def write_side_files(
        self, model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path
    ) -> None:
        write_tokenizers(model, folder)

    def files(self, spec: ComponentSpec) -> list[str]:
        return [spec.file, *([spec.data] if spec.data else [])]

    def runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        limits = Limits(max_relative_error=max_lowering_error, by_layer=_rounds(self.schemes_of(weights, schemes)))
        runner = ExecuTorchRunner(folder, manifest, executorch.layers_by_key(weights))
        return {self.runtime_names[0]: Runtime(runner, limits)}

    def lowering_limit(self, schemes: Mapping[str, Scheme]) -> float:
        if not _rounds(schemes):
            return FLOAT_ERROR
        return STATIC_LAYER_ERROR if _any_static(schemes) else self.max_lowering_error

    def emulated(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        cpu: Cpu,
        emulator: Emulator,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> EmulatedRuntime:
        layers, schemes = executorch.layers_by_key(weights), self.schemes_of(weights, schemes)
        runner, rounds = EmulatedExecuTorchRunner(folder, manifest, layers, cpu, emulator), _rounds(schemes)
        to_pytorch = Limits(max_relative_error=self.lowering_limit(schemes), by_layer=rounds)
        rounded = STATIC_WHOLE_ERROR if _any_static(schemes) else WHOLE_ERROR
        to_native = Limits(max_relative_error=rounded if rounds else ORDER_OF_SUMS)
        return EmulatedRuntime(runner, to_pytorch, to_native, within_compression=rounds)

    def memory(self, folder: Path, component: str) -> MemoryFigures:
        """Of the C++ runner: the Python bindings bring PyTorch along, whose memory would be counted with it."""
        return measure_program(folder, component)


def _rounds(schemes: Mapping[str, Scheme]) -> bool:
    """Whether any layer rounds its input."""
    return any(not scheme.is_weight_only for scheme in schemes.values())


def _any_static(schemes: Mapping[str, Scheme]) -> bool:
    return any(scheme.is_static for scheme in schemes.values())
