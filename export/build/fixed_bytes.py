# SPDX-License-Identifier: Apache-2.0
"""What ships beside the layers' weights, for a plan without a trace: counted where it is there, else estimated."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...quant.scheme import Scheme
from ...runtimes.compare.self_check import Outputs
from ...runtimes.image_size import ImageSize
from ..checkpoint.tokenizer import has_vocabulary
from ..families.base import LoadedModel
from ..families.components import layers_of, parameter_count, shapes_of
from ..families.graphs import Component
from ..sampling.spec import image_spec
from ..targets.base import Target
from ..targets.layer import Layer, kind_of
from ..units import format_bytes

MANIFEST_BYTES = 6_000
MANIFEST_BYTES_PER_LAYER = 80
"""From built artifacts; a build counts the real bytes."""
TOKENIZER_CONFIG_BYTES = 800
"""Of CLIP's own tokenizer each file but the vocabulary has 855."""
SCHEDULER_BYTES = 500


@dataclass(frozen=True)
class Estimate:
    """Bytes that were not counted, and how they came about instead."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True)
class FixedBytes:
    """Bytes of everything but the layers' weights: `counted`, and `estimates` for what is not there yet."""

    counted: int
    estimates: tuple[Estimate, ...]

    @property
    def total(self) -> int:
        """Counted and estimated bytes together."""
        return self.counted + sum(each.bytes for each in self.estimates)


def fixed_bytes(
    target: Target,
    model: LoadedModel,
    components: Sequence[Component],
    size: ImageSize,
    candidates: Mapping[str, Iterable[Scheme]],
) -> FixedBytes:
    """Returns about how many bytes ship that are not a layer's weight; `size` is the pictures' default.

    `candidates` are the schemes that each layer may get, by its full name: what is planned is the wordiest.
    Tensors that are no layer's weight count as the target stores them, configs and tokenizers as it would write them.
    Raises TurbopocketError for files that the target cannot do without.
    """
    shapes = shapes_of(layers_of(components))
    layer_count, convolutions = len(shapes), sum(len(shape) == 4 for shape in shapes.values())
    share = target.graph_share
    graphs = share.linear * (layer_count - convolutions) + share.conv2d * convolutions
    graphs += share.component * len(components)
    layers = [Layer(name, kind_of(shape), tuple(shape)) for name, shape in shapes.items()]
    forms = sum(target.form_bytes(layer, candidates[layer.name]) for layer in layers)
    why = (
        f"{share.linear:,} bytes for each of {layer_count - convolutions:,} Linear, {share.conv2d:,} for each of "
        f"{convolutions:,} Conv2d and {share.component:,} for each of {len(components)} components, as in built "
        "artifacts"
    )
    if forms:
        why += f"; {forms:,} for what the layers' schemes take"
    estimates = [
        Estimate("graphs", graphs + forms, why),
        Estimate(
            "manifest",
            MANIFEST_BYTES + MANIFEST_BYTES_PER_LAYER * layer_count,
            f"{MANIFEST_BYTES:,} bytes, and {MANIFEST_BYTES_PER_LAYER} for each layer, as in built artifacts",
        ),
        *_absent(target, model),
    ]
    other = sum(_other_parameters(component) for component in components)
    checked = Outputs.blank(image_spec(model, size)).nbytes
    return FixedBytes(share.value * other + checked + _side_files(target, model, components, size), tuple(estimates))


def _other_parameters(component: Component) -> int:
    weights = sum(math.prod(shape) for shape in shapes_of(layers_of([component])).values())
    return parameter_count(component) - weights


def _side_files(target: Target, model: LoadedModel, components: Sequence[Component], size: ImageSize) -> int:
    """Bytes of the small files that can be written from what the model's folder holds."""
    there = {
        encoder: folder
        for encoder, folder in model.tokenizers.items()
        if has_vocabulary(folder, model.family.tokenizer)
    }
    with tempfile.TemporaryDirectory() as scratch:
        names: Mapping[str, Any] = {component.name: component for component in components}
        target.write_side_files(replace(model, tokenizers=there), names, size, Path(scratch))
        return sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())


def _absent(target: Target, model: LoadedModel) -> list[Estimate]:
    """What the model's folder lacks, as published tokenizers and a scheduler's config commonly are."""
    found, lengths = [], model.family.tokenizer.lengths
    for index, (encoder, folder) in enumerate(model.tokenizers.items()):
        if has_vocabulary(folder, model.family.tokenizer):
            continue
        config: Any = model.modules[encoder].config
        names = [*target.tokenizer_files, *(target.first_tokenizer_files if index == 0 else ())]
        per_id = sum(lengths.per_id.get(name, 0) for name in names)
        flat = TOKENIZER_CONFIG_BYTES * sum(name not in lengths.per_id for name in names)
        why = (
            f"no vocabulary here: {per_id:.1f} bytes for each of {config.vocab_size:,} ids in "
            f"{', '.join(name for name in names if name in lengths.per_id)}, as in {lengths.of}"
        )
        found.append(Estimate(folder.name, math.ceil(per_id * config.vocab_size) + flat, why))
    if set(model.scheduler_config) <= {"_class_name"}:
        found.append(Estimate("scheduler", SCHEDULER_BYTES, "its config is not here; published ones are this long"))
    return found


def show_estimates(estimates: Sequence[Estimate]) -> list[str]:
    """Returns a line for each estimate of a plan."""
    return [f"  estimated: {each.what} {format_bytes(each.bytes)} ({each.why})" for each in estimates]
