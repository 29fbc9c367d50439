# SPDX-License-Identifier: Apache-2.0
"""ONNX files for ONNX Runtime, as a target."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ....runtimes.manifest import ComponentSpec, Manifest, RuntimeSpec
from ....runtimes.memory import MemoryFigures
from ....runtimes.onnx.emulated import EmulatedOnnxRunner
from ....runtimes.onnx.memory import measure as measure_memory
from ...families.base import LoadedModel
from ...families.components import components_of
from ...families.graphs import Component
from ...target_options import TARGET_ENTRIES, OnnxOptions
from ...verify.emulated import ORDER_OF_SUMS, EmulatedRuntime
from ...verify.gaps import Runtime
from ..base import NO_RANGES, GraphShare, Target
from ..layer import NO_SCHEMES, Layer, kind_of, with_references
from ..side_files import TOKENIZER_FILES, write_side_files
from . import program as onnx
from .form import DEFAULTS, FormOptions
from .memory import NODE_BYTES, NODES_PER_NORM, NODES_PER_OPERATOR, SESSION_BYTES, TENSOR_BYTES
from .names import DOMAIN, OPSET
from .stores import STORES

OLDEST = "1.23.2"
"""Of ONNX Runtime, for files in the formats of the demo and in codebooks: 1.23.2, 1.24.2 and 1.25 to 1.31 run them, on
x86-64 Linux. 1.22.1 and older have no MatMulNBits of 8 bits."""
INT8_TO_PYTORCH, INT8_TO_NATIVE = 1e-2, 1.5e-2
"""At MatMulNBits' accuracy level 4, where each CPU's kernels round activations to int8 in their own way. Measured with
int4-g32 and int8-g32: 5.6e-3 to PyTorch, which does not round, and 7.8e-3 between x86-64 and ARM. A CPU without dot
product computes in fp32 all the same: 4e-7 to PyTorch."""
INT8_KERNELS_NEED = "asimddp"
ROUNDED_INPUT_ERROR, ROUNDED_OUTPUT_ERROR = 5e-3, 1.5e-2
"""Of a layer that rounds its input, or its output too, on equal inputs: a code that is rounded the other way is a whole
step. The limits of ExecuTorch's layers, which round alike, where they were measured; layers here stayed below them in
builds of tiny models, which is all that was tried."""
ROUNDED_WHOLE_ERROR = 4e-2
"""Of a whole component that rounds, between two CPUs, and never more than compression itself changed it. ExecuTorch's
too: here the UNet of a tiny SDXL in W4A8 and W8A8 had 8.1e-2 between x86-64 and Cortex-A53, and is refused."""
NO_KERNELS = (
    "codebook layers run through the file's own graph, not the C++ kernels, which `make kernels` builds in a checkout"
)


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX Runtime."""

    options: OnnxOptions = DEFAULTS
    name = "onnx"
    stores = STORES
    tools = ("onnx", "onnxruntime")
    max_lowering_error = 1e-4
    runtime_names = ("onnxruntime",)
    graph_share = GraphShare(linear=1650, conv2d=2150, component=4_000, value=2)
    tokenizer_files = ("tokenizer.json", *TOKENIZER_FILES)

    def components(
        self, model: LoadedModel, sizes: Sequence[ImageSize], image_to_image: bool = False
    ) -> list[Component]:
        return components_of(model, sizes, image_to_image=image_to_image)

    @classmethod
    def opened(cls, options: OnnxOptions) -> Self:
        return cls(options)

    def form_options(self, ranges: Mapping[str, Ranges] = NO_RANGES) -> FormOptions:
        return FormOptions(self.options, ranges)

    def trace(self, component: Component) -> onnx.TracedGraph:
        return onnx.trace(component)

    def fitted(self, traced: onnx.TracedGraph, component: Component, ranges: Mapping[str, Ranges]) -> onnx.TracedGraph:
        return replace(traced, ranges={name: ranges[name] for name in traced.layers if name in ranges})

    def component_spec(self, traced: onnx.TracedGraph) -> ComponentSpec:
        return onnx.component_spec(traced)

    def runtime_spec(self) -> RuntimeSpec:
        return RuntimeSpec(
            name=TARGET_ENTRIES[self.name].title,
            oldest=OLDEST,
            format={"opset": OPSET, "ir_version": onnx.IR_VERSION},
            providers=["CPUExecutionProvider"],
            session={"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
        )

    def fixed_bytes(self, traced: onnx.TracedGraph, candidates: Mapping[str, Iterable[Scheme]]) -> int:
        return onnx.fixed_bytes(traced, candidates, self.options)

    def component_memory(self, operators: float, norms: int, others: int, others_bytes: int, table_bytes: int) -> int:
        nodes = NODES_PER_OPERATOR * (operators - norms) + NODES_PER_NORM * norms
        graph = SESSION_BYTES + round(NODE_BYTES * nodes) + (TENSOR_BYTES + NODE_BYTES) * others
        return graph + others_bytes - table_bytes

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

    def as_run(
        self,
        component: Component,
        weights: Mapping[str, CompressedTensor],
        ranges: Mapping[str, Ranges],
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> Component:
        own = {name: weight for name, weight in weights.items() if name.startswith(component.layer_prefix)}
        whole = self.schemes_of(own, {name: schemes[name] for name in own if name in schemes}, ranges)
        layers = {name: Layer(name, kind_of(own[name].shape), own[name].shape) for name in rounding_layers(whole)}
        options = self.form_options(ranges)
        forms = self.stores.forms_of(layers, {name: whole[name] for name in layers}, options)
        if not forms:
            return component
        found = with_references(component, forms, own)
        options.clock.watch(found)
        return found

    def write_side_files(
        self, model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path
    ) -> None:
        write_side_files(model, components, size, folder)

    def files(self, spec: ComponentSpec) -> list[str]:
        return [spec.file, f"{spec.file}.data"]

    def lowering_limit(self, schemes: Mapping[str, Scheme]) -> float:
        if not rounding_layers(schemes):
            return self.max_lowering_error
        rounds_outputs = any(scheme.output is not None for scheme in schemes.values())
        return ROUNDED_OUTPUT_ERROR if rounds_outputs else ROUNDED_INPUT_ERROR

    def runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        from ....runtimes.onnx.runner import OnnxRunner

        limits = self._limits(weights, max_lowering_error, schemes)
        return {self.runtime_names[0]: Runtime(OnnxRunner(folder, manifest), limits)}

    def _limits(
        self, weights: Mapping[str, CompressedTensor], max_lowering_error: float, schemes: Mapping[str, Scheme]
    ) -> Limits:
        rounds = bool(rounding_layers(self.schemes_of(weights, schemes)))
        return Limits(max_relative_error=max_lowering_error, by_layer=rounds)

    def kernel_runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        operators = onnx_operators()
        if operators is None or not _any_uses_ours(folder, manifest):
            return {}
        from ....runtimes.onnx.runner import OnnxRunner

        limits = self._limits(weights, max_lowering_error, schemes)
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
        schemes = self.schemes_of(weights, schemes)
        rounds = bool(rounding_layers(schemes))
        to_pytorch, to_native = self.lowering_limit(schemes), ROUNDED_WHOLE_ERROR if rounds else ORDER_OF_SUMS
        if self.options.accuracy_level == 4:
            to_native = max(to_native, INT8_TO_NATIVE)
            if INT8_KERNELS_NEED in cpu.features.split():
                to_pytorch = max(to_pytorch, INT8_TO_PYTORCH)
        return EmulatedRuntime(
            runner,
            Limits(max_relative_error=to_pytorch, by_layer=rounds),
            Limits(max_relative_error=to_native),
            within_compression=rounds,
        )

    @property
    def not_in_plan(self) -> str | None:
        return (
            "prepacked weights are not in the plan: switch target.onnx.prepacked off"
            if self.options.prepacked
            else None
        )

    def memory(self, folder: Path, component: str) -> MemoryFigures:
        return measure_memory(folder, component)


def rounding_layers(schemes: Mapping[str, Scheme]) -> list[str]:
    """Those whose activations are rounded."""
    return [name for name, scheme in schemes.items() if not scheme.is_weight_only]


def _any_uses_ours(folder: Path, manifest: Manifest) -> bool:
    return any(_uses_ours(folder / spec.file) for spec in manifest.components.values())


def _uses_ours(graph: Path) -> bool:
    """Whether the graph has operators of our own domain."""
    return any(opset.domain == DOMAIN for opset in load(graph, load_external_data=False).opset_import)
