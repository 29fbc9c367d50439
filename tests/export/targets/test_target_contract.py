# SPDX-License-Identifier: Apache-2.0
"""What every target promises of every scheme, for each kind of layer.

A layer is storable exactly where it lowers; its bytes are planned; the runtime computes what the reference does; the
same bytes come twice; and what is wrong is refused in the same words by all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.listings import SAMPLE_SCHEMES
from turbopocket.export.targets.base import Target
from turbopocket.export.targets.layer import with_references
from turbopocket.export.targets.registry import default_targets
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.fit.universal import universal_codebooks
from turbopocket.quant.formats import (
    FORMATS,
    Additive,
    Affine,
    CompressedTensor,
    Dense,
    LayerFormat,
)
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.manifest import ComponentSpec

from ..stand_ins import OneComponent
from .executorch_here import executorch_here

pytest.importorskip("coremltools")
pytest.importorskip("executorch")

NAMES = (
    *SAMPLE_SCHEMES,
    *("int8-row-asym", "int4-row-asym", "int4-g16"),
    *("int4-g32+a8-dynamic", "int4-g32+a8-static", "int8-row+a6-static", "int8-row+a8-static+float", "fp32+a8-static"),
    *("int4-row+a8-dynamic", "int4-row+a8-static", "int4-row+a8-static+float", "int8-row-asym+a8-static"),
    *("lut3", "vq6-d2", "vq8-d4-r16", "avq3x8-d4", "avq2x8-d8-shared"),
)
LAYERS = ("linear", "conv", "point")
COMPONENT = "vae_decoder"
PLANNED_OVER_WRITTEN = 1.005
FORMS = [(target.name, name) for target in default_targets() for name in NAMES]
EVERYWHERE = pytest.mark.parametrize(("target", "name"), FORMS, ids=lambda each: str(each))


class Part(nn.Module):
    """A Linear, a Conv2d of 3x3 and one of 1x1, large enough that their weights are nearly all of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 256, 3, padding=1)
        self.point = nn.Conv2d(256, 512, 1, bias=False)
        self.linear = nn.Linear(2048, 1024)

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.silu(self.point(F.silu(self.conv(x))))
        return self.linear(pixels.flatten(1)).unflatten(1, (256, 2, 2))


class Wrapped(ComponentModule):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model(latent_sample)


def component_of(model: nn.Module) -> Component:
    """Under the name of a component that every target knows."""
    sample = {"latent_sample": torch.zeros(2, 256, 2, 2)}
    return Component(COMPONENT, Wrapped(COMPONENT, model.eval()), sample, ("sample",), role="decoder")


@dataclass(frozen=True)
class Lowered:
    """A part whose layers have one scheme, where they can, else the target's own dense one."""

    target: Target
    traced: Any
    component: Component
    ranges: dict[str, Ranges]
    schemes: dict[str, Scheme]
    weights: dict[str, CompressedTensor]
    folder: Path
    spec: ComponentSpec

    @property
    def written(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.target.files(self.spec))


def target_of(name: str) -> Target:
    return next(each for each in default_targets() if each.name == name)


@cache
def traced(target_name: str) -> tuple[Component, Any, dict[str, Ranges]]:
    torch.manual_seed(0)
    component, target = component_of(Part()), target_of(target_name)
    samples = torch.randn(4, 1, 256, 2, 2)
    stats = calibrate({COMPONENT: component.module.model}, lambda: [component.module(each) for each in samples])
    ranges = ranges_of(stats)
    return component, target.fitted(target.trace(component), component, ranges), ranges


def compressed(target: Target, format: LayerFormat, weight: Tensor) -> CompressedTensor:
    """The weight in that format; tables hold random numbers of its size, since k-means would take minutes."""
    if isinstance(format, Dense | Affine):
        return format.compress(weight, replace(ABSMAX, group_scale_digits=target.group_scale_digits))
    random, size = torch.Generator().manual_seed(1), float(weight.detach().std())
    parts = {}
    for part, spec in format.part_specs(tuple(weight.shape)).items():
        if spec.dtype == torch.uint8:
            parts[part] = torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=random)
        elif part == "scale":
            parts[part] = (torch.rand(spec.shape, generator=random) * size).to(spec.dtype)
        else:
            parts[part] = torch.randn(spec.shape, generator=random).to(spec.dtype)
    if isinstance(format, Additive) and format.shared:
        parts["codebooks"] = universal_codebooks(format.length)[: format.count]
    return CompressedTensor(format, tuple(weight.shape), parts)


def first_storable(target: Target, layer: Any, *names: str) -> Scheme:
    schemes = map(parse_scheme, names)
    return next(each for each in schemes if target.storable(each, layer.kind, layer.shape) is None)


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Lowered]]:
    """The part in one scheme on one target, lowered once."""

    @cache
    def lowered(target_name: str, name: str) -> Lowered:
        target = target_of(target_name)
        component, graph, ranges = traced(target_name)
        wanted = parse_scheme(name)
        if name != "fp32" and all(target.storable(wanted, each.kind, each.shape) for each in graph.layers.values()):
            return lowered(target_name, "fp32")
        schemes = {path: first_storable(target, layer, name, "fp32", "fp16") for path, layer in graph.layers.items()}
        weights = {
            path: compressed(target, scheme.weight, component.module.get_parameter(f"{path}.weight"))
            for path, scheme in schemes.items()
        }
        folder = tmp_path_factory.mktemp(f"{target.name}-{name}")
        spec = target.lower(graph, weights, folder, schemes)
        return Lowered(target, graph, component, ranges, schemes, weights, folder, spec)

    yield lowered
    traced.cache_clear()


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    with executorch_here():
        yield


def test_every_class_of_formats_is_asked() -> None:
    assert {type(parse_scheme(name).weight) for name in NAMES} == set(FORMATS)


@pytest.mark.parametrize("layer", LAYERS)
@EVERYWHERE
def test_a_layer_is_storable_exactly_where_it_lowers(
    target: str, name: str, layer: str, lower: Callable[[str, str], Lowered], tmp_path: Path
) -> None:
    part, path, scheme = lower(target, name), f"{COMPONENT}.{layer}", parse_scheme(name)
    asked = part.traced.layers[path]
    reason = part.target.storable(scheme, asked.kind, asked.shape)
    if reason is None:
        assert part.schemes[path] == scheme
        assert part.target.stored_as(scheme, asked.kind)
        return
    weight = compressed(part.target, scheme.weight, part.component.module.get_parameter(f"{path}.weight"))
    for refused in (
        lambda: part.target.lower(part.traced, part.weights | {path: weight}, tmp_path, part.schemes | {path: scheme}),
        lambda: part.target.lowered_bytes(part.traced, part.schemes | {path: scheme}),
    ):
        with pytest.raises(TurbopocketError) as caught:
            refused()
        assert str(caught.value) == f"{path}: {reason}"
    assert list(tmp_path.iterdir()) == []


@EVERYWHERE
def test_planned_bytes_are_those_written(target: str, name: str, lower: Callable[[str, str], Lowered]) -> None:
    part = lower(target, name)
    planned = part.target.lowered_bytes(part.traced, part.schemes)
    own = sum(weight.nbytes for weight in part.weights.values())
    assert own < part.written <= planned <= PLANNED_OVER_WRITTEN * part.written
    if not any(each.format.shared_parts for each in part.weights.values()):  # counted when all formats are known
        candidates = dict.fromkeys(part.schemes, frozenset(part.schemes.values()))
        before = part.target.fixed_bytes(part.traced, candidates) + own
        assert part.written <= before <= 1.01 * part.written


@EVERYWHERE
def test_each_layer_computes_what_its_reference_does(
    target: str, name: str, lower: Callable[[str, str], Lowered]
) -> None:
    part = lower(target, name)
    schemes = part.target.schemes_of(part.weights, part.schemes, part.ranges)
    limit = part.target.lowering_limit(schemes)
    manifest: Any = OneComponent({COMPONENT: part.spec})
    runtimes = part.target.runtimes(part.folder, manifest, part.weights, limit, schemes)
    runner = runtimes[part.target.runtime_names[0]].runner
    random = torch.Generator().manual_seed(2)
    inputs = {"latent_sample": torch.randn(1, 256, 2, 2, generator=random).half().float().numpy()}
    forms = part.target.stores.forms_of(part.traced.layers, schemes, part.target.form_options(part.ranges))
    reference = torch_runner([with_references(part.component, forms, part.weights)])
    found = runner.run_layers(COMPONENT, inputs, LAYERS)
    assert set(found) == {form.layer.path for form in forms.values() if getattr(form, "named_by_hash", True)}
    outputs, expected = reference.run_following(COMPONENT, inputs, found)
    floats, without = torch_runner([part.component]).run_following(COMPONENT, inputs, found)
    found = found | runner.run(COMPONENT, inputs)
    expected, without = expected | outputs, without | floats
    assert {each: value.shape for each, value in found.items()} == {each: expected[each].shape for each in found}
    errors = {each: relative_error(value, expected[each]) for each, value in found.items()}
    assert max(errors.values()) <= limit, errors
    if name not in ("fp32", "fp16") and name in map(str, part.schemes.values()):
        lost = max(relative_error(value, without[each]) for each, value in found.items())
        assert lost > 3 * max(errors.values()), "is it compressed?"


@pytest.mark.parametrize("target", [target.name for target in default_targets()])
def test_lowering_twice_gives_the_same_bytes(target: str, lower: Callable[[str, str], Lowered], tmp_path: Path) -> None:
    part = lower(target, "int4-g32")
    again = part.target.trace(part.component)
    assert part.target.lower(again, part.weights, tmp_path, part.schemes) == part.spec
    for file in part.target.files(part.spec):
        assert (part.folder / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("target", [target.name for target in default_targets()])
def test_weights_that_are_not_the_layers_are_refused(
    target: str, lower: Callable[[str, str], Lowered], tmp_path: Path
) -> None:
    part = lower(target, "int8-row")
    foreign, first = f"{COMPONENT}.stranger", f"{COMPONENT}.linear"
    without = {name: weight for name, weight in part.weights.items() if name != first}
    for weights, message in (
        (part.weights | {foreign: part.weights[first]}, f"the graph has no {foreign}"),
        (without, f"no format for {first}"),
        ({}, f"no format for {COMPONENT}.conv and 2 other layers"),
    ):
        with pytest.raises(TurbopocketError) as caught:
            part.target.lower(part.traced, weights, tmp_path)
        assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Toy(LayerFormat):
    """A format that no target has heard of."""

    syntax: ClassVar[str] = "toy"
    weight_bits: ClassVar[float] = 8.0  # type: ignore[misc]

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls() if text == "toy" else None

    def __str__(self) -> str:
        return "toy"

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None

    def part_specs(self, shape: tuple[int, ...]) -> Any:
        raise NotImplementedError

    encode = decode = part_specs  # type: ignore[assignment]


@pytest.mark.parametrize("target", default_targets(), ids=lambda target: target.name)
def test_an_unknown_format_is_told_nothing_else(target: Target) -> None:
    for kind, shape in (("linear", (64, 64)), ("conv2d", (64, 64, 3, 3))):
        reason = target.storable(Scheme(Toy()), kind, shape)  # type: ignore[arg-type]
        assert reason == f"turbopocket writes no {kind} for {target.stores.target} in toy"


class Sharing(nn.Module):
    """One norm under two names, and what a test makes of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(256, 256, bias=False) for _ in range(2))
        self.norm = self.again = nn.LayerNorm(256)
        self.scale = nn.Parameter(torch.ones(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.again(self.first(self.norm(x.flatten(2).transpose(1, 2))))
        return self.second(rows @ self.scale).transpose(1, 2).unflatten(2, (2, 2))


@pytest.mark.parametrize("target", default_targets(), ids=lambda target: target.name)
def test_no_weight_of_a_layer_may_be_another_parameter_but_norms_may(target: Target, tmp_path: Path) -> None:
    part = Sharing()
    nn.init.normal_(part.norm.weight)
    component = component_of(part)
    graph = target.trace(component)
    weights = {
        path: compressed(
            target,
            first_storable(target, layer, "fp32", "fp16").weight,
            component.module.get_parameter(f"{path}.weight"),
        )
        for path, layer in graph.layers.items()
    }
    inputs = {
        "latent_sample": torch.randn(1, 256, 2, 2, generator=torch.Generator().manual_seed(3)).half().float().numpy()
    }
    manifest: Any = OneComponent({COMPONENT: target.lower(graph, weights, tmp_path)})
    runner = target.runtimes(tmp_path, manifest, weights, target.max_lowering_error)[target.runtime_names[0]].runner
    expected = torch_runner([component]).run(COMPONENT, inputs)["sample"]
    assert relative_error(runner.run(COMPONENT, inputs)["sample"], expected) <= target.max_lowering_error
    for other in ("first.weight", "scale"):
        shared = Sharing()
        shared.second.weight = shared.get_parameter(other)
        with pytest.raises(TurbopocketError) as caught:
            target.trace(component_of(shared))
        names = f"{COMPONENT}.{other} and {COMPONENT}.second.weight"
        assert str(caught.value) == f"{names} are one parameter: layers with shared weights are not supported"


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_layers_that_do_not_share_the_codebooks_they_must_are_refused(
    target: str, lower: Callable[[str, str], Lowered], tmp_path: Path
) -> None:
    part, path = lower(target, "avq2x8-d8-shared"), f"{COMPONENT}.point"
    weight = part.weights[path]
    other = replace(weight, parts=weight.parts | {"codebooks": weight.parts["codebooks"] + 1})
    with pytest.raises(TurbopocketError) as caught:
        part.target.lower(part.traced, part.weights | {path: other}, tmp_path)
    assert str(caught.value) == f"{path}: its codebooks of avq2x8-d8-shared are not those of other layers"
    assert list(tmp_path.iterdir()) == []
