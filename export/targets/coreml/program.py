# SPDX-License-Identifier: Apache-2.0
"""A component as Core ML packages that Apple's Swift package StableDiffusion runs, weights as compressed as planned.

`trace` has coremltools convert the component once, without its layers' weights; all sizes then follow from shapes
(`fixed_bytes`, `lowered_bytes`), before any weight is compressed, and `lower` writes the same bytes every time.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ....quant.formats import CompressedTensor
from ....quant.scheme import Scheme
from ....runtimes.coreml.file.dtypes import TensorType
from ....runtimes.coreml.file.package import coremltools_module
from ....runtimes.coreml.interface import CHUNKS, layer_value, loop_spec, package_file
from ....runtimes.manifest import ComponentSpec, TensorSpec
from ...checkpoint.card import NO_CARD, ModelCard
from ...families.graphs import Component
from ...target_options import CoreMLOptions
from ..layer import NO_SCHEMES, schemes_of
from .emit import constants_of, geometry_constants, path_of
from .interface import wrapped
from .lowering import Lowering, is_cut, layer_bytes, skeleton_bytes
from .mil import Message, type_of
from .package import PACKAGE_PATHS, write_package
from .stores import STORES
from .trace import LAYER, Skeleton, TracedProgram, compressible_paths

__all__ = [
    "CoreMLOptions",
    "TracedProgram",
    "component_spec",
    "fixed_bytes",
    "layer_value",
    "lower",
    "lowered_bytes",
    "package_files",
    "trace",
]


DEFAULTS = CoreMLOptions()


def trace(
    component: Component,
    options: CoreMLOptions = DEFAULTS,
    largest: Mapping[str, float] = MappingProxyType({}),
    card: ModelCard = NO_CARD,
) -> TracedProgram:
    """Runs PyTorch's tracer and coremltools once. Layer weights are neither copied nor looked at.

    `largest` holds the largest magnitude that calibration saw in the output of a layer, by the layer's full name: what
    fp16 can not hold is computed in fp32. `card` is what the packages say of the model.

    Raises TurbopocketError when coremltools is missing, when two layers share one weight, or when the largest values
    name a layer that does not run or can not be held by an output of the package.
    """
    require_coremltools()
    from .convert import converted
    from .precision import Fp32Region

    component = component.without_weights()
    package = wrapped(component, options.batch)
    region = Fp32Region(component.name, package.outputs, largest)
    with converted(package, compressible_paths(component), options.deployment, region) as (model, constants):
        function = model.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        types = {output.name: type_of(output.type) for op in block.operations for output in op.outputs}
        outputs = {name: types[name] for name in block.outputs}
        skeleton = Skeleton(component.name, list(block.operations), outputs)
        skeleton.take_blobs(constants)
    skeleton.take_layers()
    skeleton.add_zero_biases()
    layers = list(skeleton.layers.values())
    skeleton.share_constants()
    skeleton.operations[:0] = geometry_constants(layers)
    region.require_sound(layers)
    return TracedProgram(
        component=component.name,
        deployment=options.deployment,
        inputs={value.name: type_of(value.type) for value in function.inputs},
        outputs=outputs,
        operations=skeleton.operations,
        layers={layer.name: layer for layer in layers},
        rest=skeleton.rest,
        rest_types=skeleton.rest_types,
        max_package_bytes=options.max_package_bytes,
        card=card,
    )


def lower(
    traced: TracedProgram,
    weights: Mapping[str, CompressedTensor],
    folder: Path,
    schemes: Mapping[str, Scheme] = NO_SCHEMES,
) -> ComponentSpec:
    """Writes the component's package, or its two chunks, under `folder`; returns what a manifest says of it.

    `schemes` are as `Target.lower` has them.

    Raises TurbopocketError when `weights` are not exactly the traced layers' or Core ML can not store one of them.
    """
    lowering = Lowering(traced, schemes_of(weights, schemes))
    packages = lowering.packages()
    for content in packages:
        write_package(content, folder, lowering.arrays(content.blobs, weights))
    return component_spec(traced, [content.file for content in packages])


def component_spec(traced: TracedProgram, packages: Sequence[str] = ()) -> ComponentSpec:
    """What a manifest says of the component's packages: their own tensors, and how the drawing loop has them.

    Before there are any, they are those that large weights would need.
    """
    if not packages:
        largest = sum(4 * prod(layer.shape) for layer in traced.layers.values())
        cut = is_cut(traced, skeleton_bytes(traced) + largest)
        packages = [package_file(traced.component, chunk) for chunk in (range(1, CHUNKS + 1) if cut else (None,))]
    inputs = [_tensor_spec(name, tensor) for name, tensor in traced.inputs.items()]
    outputs = [_tensor_spec(name, tensor) for name, tensor in traced.outputs.items()]
    return ComponentSpec(
        file=f"{packages[0]}/{PACKAGE_PATHS[0]}",
        packages=list(packages),
        inputs=inputs,
        outputs=outputs,
        loop=loop_spec(traced.component, inputs, outputs),
    )


def package_files(spec: ComponentSpec) -> list[str]:
    """Paths of all files of the component's packages."""
    return [f"{package}/{path}" for package in spec.packages for path in PACKAGE_PATHS]


def lowered_bytes(traced: TracedProgram, schemes: Mapping[str, Scheme]) -> int:
    """Exact bytes of all files that `lower` would write for layers in these schemes."""
    return sum(content.nbytes for content in Lowering(traced, schemes).packages())


def fixed_bytes(traced: TracedProgram, candidates: Mapping[str, Iterable[Scheme]]) -> int:
    """Bytes of all files beside the layers' `nbytes`, at most, when every layer gets one of its candidates.

    Candidates that a layer can not be stored in count for nothing.
    """
    uses: dict[str, list[Message]] = {}
    for op in traced.operations:
        if op.type == LAYER:
            uses.setdefault(path_of(op), []).append(op)
    constants = constants_of(traced.operations)
    overhead = largest = 0
    for layer in traced.layers.values():
        kept = STORES.storable_forms(layer, candidates[layer.name], traced.deployment)
        totals = [layer_bytes(form, uses[layer.path], constants) for form in kept]
        overhead += max((n - form.format.nbytes(layer.shape) for n, form in zip(totals, kept, strict=True)), default=0)
        largest += max(totals, default=0)
    skeleton = skeleton_bytes(traced)
    return overhead + skeleton * (CHUNKS if is_cut(traced, skeleton + largest) else 1)


def require_coremltools() -> None:
    """Returns when coremltools can be imported; TurbopocketError says how to get it."""
    coremltools_module("converters")


def _tensor_spec(name: str, tensor: TensorType) -> TensorSpec:
    return TensorSpec(name=name, dtype=_EDGE_DTYPES[tensor.dtype.name], shape=list(tensor.shape))


_EDGE_DTYPES: dict[str, Literal["float16", "float32"]] = {"FLOAT16": "float16", "FLOAT32": "float32"}
