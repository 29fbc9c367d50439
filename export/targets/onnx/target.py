# SPDX-License-Identifier: Apache-2.0
"""ONNX files for ONNX Runtime, as a target."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from onnx import load

from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....quant.ranges import Ranges
from ....quant.scheme import Scheme
from ....runtimes.arm64.cpus import PREFIX, Cpu
from ....runtimes.arm64.emulator import Emulator
from ....runtimes.compare.rows import Limits
from ....runtimes.image_size import ImageSize
from ....runtimes.kernels.library import onnx_operators
from ....runtimes.manifest import ComponentSpec, Manifest
from ....runtimes.memory import MemoryFigures
from ....runtimes.onnx.emulated import EmulatedOnnxRunner
from ....runtimes.onnx.memory import measure as measure_memory
from ...families.base import LoadedModel
from ...families.components import components_of
from ...families.graphs import Component
from ...target_options import OnnxOptions
from ...verify.emulated import ORDER_OF_SUMS, EmulatedRuntime
from ...verify.gaps import Runtime
from ..base import NO_RANGES, GraphShare, Target
from ..layer import NO_SCHEMES
from ..side_files import TOKENIZER_FILES, write_side_files
from . import program as onnx
from .stores import STORES
from .trace import DOMAIN

INT8_TO_PYTORCH, INT8_TO_NATIVE = 1e-2, 1.5e-2
"""At MatMulNBits' accuracy level 4, where each CPU's kernels round activations to int8 in their own way. Measured with
int4-g32 and int8-g32: 5.6e-3 to PyTorch, which does not round, and 7.8e-3 between x86-64 and ARM. A CPU without dot
product computes in fp32 all the same: 4e-7 to PyTorch."""
INT8_KERNELS_NEED = "asimddp"
NO_KERNELS = "codebook layers run through the file's own graph, not the C++ kernels: `make kernels` was not run here"


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX Runtime."""

    options: OnnxOptions = onnx.DEFAULTS
    name = "onnx"
    stores = STORES
    tools = ("onnx", "onnxruntime")
    max_lowering_error = 1e-4
    runtime_names = ("onnxruntime",)
    graph_share = GraphShare(linear=1650, conv2d=1400, component=4_000, value=2)
    tokenizer_files = ("tokenizer.json", *TOKENIZER_FILES)

    def components(
        self, model: LoadedModel, sizes: Sequence[ImageSize], image_to_image: bool = False
    ) -> list[Component]:
        return components_of(model, sizes, image_to_image=image_to_image)

    @classmethod
    def opened(cls, options: OnnxOptions) -> Self:
        return cls(options)

    def form_options(self, ranges: Mapping[str, Ranges] = NO_RANGES) -> OnnxOptions:
        return self.options

    def trace(self, component: Component) -> onnx.TracedGraph:
        return onnx.trace(component)

    def component_spec(self, traced: onnx.TracedGraph) -> ComponentSpec:
        return onnx.component_spec(traced)

    def fixed_bytes(self, traced: onnx.TracedGraph, candidates: Mapping[str, Iterable[Scheme]]) -> int:
        return onnx.fixed_bytes(traced, candidates)

    def lowered_bytes(self, traced: onnx.TracedGraph, schemes: Mapping[str, Scheme]) -> int:
        return onnx.lowered_bytes(traced, schemes, self.options)

    def lower(
        self,
        traced: onnx.TracedGraph,
        weights: Mapping[str, CompressedTensor],
        folder: Path,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> ComponentSpec:
        return onnx.lower(traced, weights, folder, self.options, schemes)

    def write_side_files(
        self, model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path
    ) -> None:
        write_side_files(model, components, size, folder)

    def files(self, spec: ComponentSpec) -> list[str]:
        return [spec.file, f"{spec.file}.data"]

    def runtimes(
        self, folder: Path, manifest: Manifest, weights: Mapping[str, CompressedTensor], max_lowering_error: float
    ) -> dict[str, Runtime]:
        from ....runtimes.onnx.runner import OnnxRunner

        limits = Limits(max_relative_error=max_lowering_error)
        return {self.runtime_names[0]: Runtime(OnnxRunner(folder, manifest), limits)}

    def kernel_runtimes(
        self, folder: Path, manifest: Manifest, weights: Mapping[str, CompressedTensor], max_lowering_error: float
    ) -> dict[str, Runtime]:
        operators = onnx_operators()
        if operators is None or not _any_uses_ours(folder, manifest):
            return {}
        from ....runtimes.onnx.runner import OnnxRunner

        limits = Limits(max_relative_error=max_lowering_error)
        return {"onnxruntime+kernels": Runtime(OnnxRunner(folder, manifest, operators=operators), limits)}

    def notes(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        if onnx_operators() is not None or not _any_uses_ours(folder, manifest):
            return ()
        return (NO_KERNELS,)

    def emulated(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        cpu: Cpu,
        emulator: Emulator,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> EmulatedRuntime:
        if self.options.prepacked:
            raise TurbopocketError(
                f"the weights are prepacked for the CPU that built them, they do not run on {PREFIX}{cpu.name}",
                hint="build without target.onnx.prepacked",
            )
        runner = EmulatedOnnxRunner(folder, manifest, cpu, emulator)
        to_pytorch, to_native = self.max_lowering_error, ORDER_OF_SUMS
        if self.options.accuracy_level == 4:
            to_native = INT8_TO_NATIVE
            if INT8_KERNELS_NEED in cpu.features.split():
                to_pytorch = INT8_TO_PYTORCH
        return EmulatedRuntime(runner, Limits(max_relative_error=to_pytorch), Limits(max_relative_error=to_native))

    @property
    def not_in_plan(self) -> str | None:
        return (
            "prepacked weights are not in the plan: switch target.onnx.prepacked off"
            if self.options.prepacked
            else None
        )

    def memory(self, folder: Path, component: str) -> MemoryFigures:
        return measure_memory(folder, component)


def _any_uses_ours(folder: Path, manifest: Manifest) -> bool:
    return any(_uses_ours(folder / spec.file) for spec in manifest.components.values())


def _uses_ours(graph: Path) -> bool:
    """Whether the graph has operators of our own domain."""
    return any(opset.domain == DOMAIN for opset in load(graph, load_external_data=False).opset_import)
