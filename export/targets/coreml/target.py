# SPDX-License-Identifier: Apache-2.0
"""Core ML packages, as a target: Apple's names and folder, checked by our evaluator where there is no Mac."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....quant.ranges import Ranges
from ....quant.scheme import Scheme
from ....runtimes.compare.rows import Limits
from ....runtimes.coreml import apple
from ....runtimes.coreml.evaluate.evaluator import Mode
from ....runtimes.coreml.interface import package_file
from ....runtimes.coreml.lint import UNVERIFIED, lint
from ....runtimes.coreml.runner import CoreMLRunner
from ....runtimes.image_size import ImageSize
from ....runtimes.manifest import ComponentSpec, Manifest, RuntimeSpec
from ...checkpoint.card import NO_CARD, ModelCard
from ...families.base import LoadedModel
from ...families.components import components_of
from ...families.graphs import Component
from ...families.sizes import require_even_levels
from ...target_options import TARGET_ENTRIES, CoreMLOptions, Deployment
from ...verify.gaps import Runtime
from ..base import NO_RANGES, GraphShare, Target
from ..layer import NO_SCHEMES
from ..side_files import SWIFT_FILES, write_swift_files
from . import program as coreml
from .precision import too_large
from .stores import STORES

FP16_ERROR, ACC16_ERROR = 0.1, 0.7
"""Where every result is rounded to fp16, as devices do, no figure is right; these only tell rounding from ruin. `acc16`
is more pessimistic than any device is known to be: small numbers lose their digits in a LayerNorm's squares, which left
an error of 0.26 in the bundled model's text encoders. Nothing but zeros has 1."""


NO_VARIANCE = (
    "VAEEncoder gives latents without their variance, which Apple's Swift package looks for: an app has to ask it"
)


@dataclass(frozen=True)
class CoreML(Target):
    """Core ML on an Apple device."""

    options: CoreMLOptions = coreml.DEFAULTS
    card: ModelCard = NO_CARD
    """What packages say of who made the model, and under which licence."""

    name = "coreml"
    own_runtime = False
    stores = STORES
    tools = ("coremltools",)
    max_lowering_error = 1e-3
    graph_share = GraphShare(linear=1950, conv2d=4000, component=20_000, value=2)
    first_tokenizer_files = SWIFT_FILES

    @property
    def runtime_names(self) -> tuple[str, ...]:
        return tuple(_runs(self.max_lowering_error))

    def components(
        self, model: LoadedModel, sizes: Sequence[ImageSize], image_to_image: bool = False
    ) -> list[Component]:
        components = components_of(model, sizes, all_states=False, image_to_image=image_to_image)
        for component in components:
            package_file(component.name)  # raises where there is no package for it
        require_even_levels(model, sizes, "Core ML packages")  # which enlarge by whole factors only
        return components

    @classmethod
    def opened(cls, options: CoreMLOptions) -> Self:
        return cls(options)

    def crediting(self, card: ModelCard) -> Self:
        return replace(self, card=card)

    def form_options(self, ranges: Mapping[str, Ranges] = NO_RANGES) -> Deployment:
        return self.options.deployment

    def trace(self, component: Component) -> coreml.TracedProgram:
        return self._traced(component, {})

    def fitted(
        self, traced: coreml.TracedProgram, component: Component, ranges: Mapping[str, Ranges]
    ) -> coreml.TracedProgram:
        """Converted once more when fp16 can not hold what a layer of the component gives."""
        largest = {name: layer.largest_output for name, layer in ranges.items() if name in traced.layers}
        if not any(map(too_large, largest.values())):
            return traced
        return self._traced(component, largest)

    def _traced(self, component: Component, largest: Mapping[str, float]) -> coreml.TracedProgram:
        return coreml.trace(component, self.options, largest, self.card)

    def component_spec(self, traced: coreml.TracedProgram) -> ComponentSpec:
        return coreml.component_spec(traced)

    def runtime_spec(self) -> RuntimeSpec:
        return RuntimeSpec(name=TARGET_ENTRIES[self.name].title, oldest=self.options.deployment)

    def fixed_bytes(self, traced: coreml.TracedProgram, candidates: Mapping[str, Iterable[Scheme]]) -> int:
        return coreml.fixed_bytes(traced, candidates)

    def lowered_bytes(self, traced: coreml.TracedProgram, schemes: Mapping[str, Scheme]) -> int:
        return coreml.lowered_bytes(traced, schemes)

    def lower(
        self,
        traced: coreml.TracedProgram,
        weights: Mapping[str, CompressedTensor],
        folder: Path,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> ComponentSpec:
        return coreml.lower(traced, weights, folder, schemes)

    def write_side_files(
        self, model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path
    ) -> None:
        write_swift_files(model, folder)

    def files(self, spec: ComponentSpec) -> list[str]:
        return coreml.package_files(spec)

    def runtimes(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Mapping[str, CompressedTensor],
        max_lowering_error: float,
        schemes: Mapping[str, Scheme] = NO_SCHEMES,
    ) -> dict[str, Runtime]:
        return {
            name: Runtime(CoreMLRunner(folder, manifest, mode), Limits(max_relative_error=limit))
            for name, (mode, limit) in _runs(max_lowering_error).items()
        }

    def inspect(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        packages = {file.path.split("/", 1)[0] for file in manifest.files if ".mlpackage/" in file.path}
        reports = [lint(folder / package) for package in sorted(packages)]
        for report in reports:
            if not report.passed:
                raise TurbopocketError(f"{report.package.name}: {report.errors[0]}")
        return UNVERIFIED

    def notes(self, folder: Path, manifest: Manifest) -> tuple[str, ...]:
        pipeline = manifest.pipeline
        told = ", ".join(pipeline.guidance_inputs)
        no_variance = pipeline.encoder is not None and pipeline.encoder.gives == "latents"
        return (
            *([f"Unet takes {told}, which Apple's Swift package does not give: an app has to"] if told else []),
            *([NO_VARIANCE] if no_variance else []),
        )

    def memory(self, folder: Path, component: str) -> None:
        """Only a device can tell."""


def _runs(max_lowering_error: float) -> dict[str, tuple[Mode | None, float]]:
    """Arithmetic and limit by the runtime's name; the mode is None for Apple's runtime."""
    rounded = max(FP16_ERROR, max_lowering_error)
    runs: dict[str, tuple[Mode | None, float]] = {
        "evaluator fp32": ("fp32", max_lowering_error),
        "evaluator fp16": ("fp16", rounded),
        "evaluator acc16": ("acc16", max(ACC16_ERROR, max_lowering_error)),
    }
    return runs | ({"Core ML on this Mac": (None, rounded)} if apple.on_a_mac() else {})
