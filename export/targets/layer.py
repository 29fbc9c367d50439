# SPDX-License-Identifier: Apache-2.0
"""Where a weight format meets a target: one form per class of formats and kind of layer, and nowhere else.

O outputs, I inputs, kh kw kernel height and width.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...ground.errors import TurbopocketError
from ...ground.names import LayerName
from ...quant.formats import CompressedTensor, LayerFormat
from ...quant.layers import CompressedSource, set_source
from ...quant.scheme import Scheme
from ..families.graphs import Component

Kind = Literal["linear", "conv2d"]
NO_SCHEMES: Mapping[str, Scheme] = MappingProxyType({})
"""For layers of which nothing but the weight's format is decided."""


def kind_of(shape: Sequence[int]) -> Kind:
    """The kind of layer that has a weight of this shape: [O, I] or [O, I, kh, kw]."""
    return "conv2d" if len(shape) == 4 else "linear"


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d of a component: `name` is its module path with the component's name in front."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """Its module path inside the component."""
        return LayerName.parse(self.name).path


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of memory that a layer takes: `held` while its component is open, once it has run, and `scratch` beside
    activations while it runs. A buffer of `kept` stays for the next weight of its shape, which then takes `again`
    beside it."""

    held: int
    scratch: int = 0
    kept: int = 0
    again: int = 0


class LayerUse(Protocol):
    """What a call of the component gives a layer and gets of it: numbers in and out, and N input vectors."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def vectors(self) -> int: ...


@dataclass(frozen=True)
class LayerForm(ABC):
    """One layer in one scheme on one target; all but `arrays` and `reference` follows from the shape alone.

    `options` are what the target's options say of layers.
    """

    layer: Layer
    scheme: Scheme
    options: Any

    summary: ClassVar[str]
    """What reads the weight, and computes with it, for tables."""

    @property
    def format(self) -> Any:
        """How its weight is stored."""
        return self.scheme.weight

    @classmethod
    @abstractmethod
    def refusal(cls, format: Any, shape: tuple[int, ...], options: Any) -> str | None:
        """None when a weight of this shape, which the format fits, can be stored; else the reason with its numbers."""

    @classmethod
    def resolved(cls, format: Any, layer: str | None, options: Any) -> Scheme:
        """The scheme in which the target runs a weight of that format: by default activations stay floats.

        `layer` is its full name, for options that hold what calibration saw; None where it is not known.
        """
        return Scheme(format)

    @classmethod
    def rounding_refusal(cls, scheme: Scheme) -> str | None:
        """None when activations can be rounded as the scheme says, else the reason."""
        return None if scheme.is_weight_only else f"activations beside {scheme.weight} are not rounded"

    @classmethod
    def stored_as(cls, scheme: Scheme) -> str:
        """`summary`, of one scheme."""
        return cls.summary

    def memory(self, use: LayerUse) -> LayerBytes:
        """What it takes of memory in one such call: by default its weight as it is stored, and no more."""
        return LayerBytes(self.format.nbytes(self.layer.shape))

    @property
    def dense_bytes(self) -> int:
        """Of its weight in float32."""
        return 4 * math.prod(self.layer.shape)

    @abstractmethod
    def tensors(self) -> Sequence[Any]:
        """Type and shape of everything that is stored of the weight, in the target's own terms."""

    @abstractmethod
    def arrays(self, weight: CompressedTensor) -> Sequence[Any]:
        """The values of `tensors`, in their order."""

    def shared(self) -> tuple[int, ...]:
        """Which of `tensors`, by index, all layers of the format have in common: they are stored once."""
        return ()

    def reference(self, module: nn.Module, weight: CompressedTensor) -> nn.Module:
        """The layer as the runtime computes it, in PyTorch; it shares all of `module`'s tensors but the weight.

        Where a runtime rounds nothing by design that is the layer with the stored weight, decompressed when it runs.
        """
        dense = copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters()})
        set_source(dense, CompressedSource(weight))
        return dense


Form = TypeVar("Form", bound=LayerForm)


@dataclass(frozen=True)
class Stores(Generic[Form]):
    """What a target stores natively: `forms` by class of formats and kind of layer; `target` is its name in messages.

    A format that is not in `forms` has no compressed form there. `rounding` are the forms of layers whose activations
    are rounded, where other operators run these; elsewhere it is `forms` too.
    """

    target: str
    forms: Mapping[tuple[type[LayerFormat], Kind], type[Form]]
    rounding: Mapping[tuple[type[LayerFormat], Kind], type[Form]] = field(default_factory=dict)

    def resolved(self, scheme: Scheme, kind: Kind, options: Any, layer: str | None = None) -> Scheme:
        """A weight format that says nothing of activations, in the scheme in which the target runs it; others as is.

        `layer` is its full name: options may hold what it saw.
        """
        form = self.forms.get((type(scheme.weight), kind))
        if form is None or not scheme.is_weight_only:
            return scheme
        return form.resolved(scheme.weight, layer, options)

    def storable(self, scheme: Scheme, kind: Kind, shape: tuple[int, ...], options: Any) -> str | None:
        """None when a layer of this kind and shape stays compressed and is run in that scheme, else the reason."""
        format = scheme.weight
        if (type(format), kind) not in self.forms:
            return f"turbopocket writes no {kind} for {self.target} in {format}"
        whole = self.resolved(scheme, kind, options)
        form = self._form_class(whole, kind)
        return format.fits(shape) or form.refusal(format, shape, options) or form.rounding_refusal(whole)

    def stored_as(self, scheme: Scheme, kind: Kind, options: Any) -> str:
        """The operators that read a weight, and round activations, in a storable scheme."""
        whole = self.resolved(scheme, kind, options)
        return self._form_class(whole, kind).stored_as(whole)

    def form_of(self, layer: Layer, scheme: Scheme, options: Any) -> Form:
        """The layer's form in that scheme. Raises TurbopocketError with `storable`'s reason when there is none."""
        reason = self.storable(scheme, layer.kind, layer.shape, options)
        if reason is not None:
            raise TurbopocketError(f"{layer.name}: {reason}")
        whole = self.resolved(scheme, layer.kind, options, layer.name)
        return self._form_class(whole, layer.kind)(layer, whole, options)

    def _form_class(self, whole: Scheme, kind: Kind) -> type[Form]:
        """Of a resolved scheme."""
        key = type(whole.weight), kind
        form = None if whole.is_weight_only else self.rounding.get(key)
        return form or self.forms[key]

    def storable_forms(self, layer: Layer, schemes: Iterable[Scheme], options: Any) -> list[Form]:
        """The layer's forms in those of the schemes that it can be stored in."""
        kept = [each for each in schemes if self.storable(each, layer.kind, layer.shape, options) is None]
        return [self.form_of(layer, scheme, options) for scheme in kept]

    def forms_of(self, layers: Mapping[str, Layer], schemes: Mapping[str, Scheme], options: Any) -> dict[str, Form]:
        """Each layer's form, by its full name, in the layers' order.

        Raises TurbopocketError when `schemes` are not exactly the layers', or one of them can not be stored.
        """
        missing, foreign = sorted(layers.keys() - schemes), sorted(schemes.keys() - layers)
        for problem, names in (("no format for", missing), ("the graph has no", foreign)):
            if names:
                raise TurbopocketError(f"{problem} {names[0]}{_and_others(len(names) - 1)}")
        return {name: self.form_of(layer, schemes[name], options) for name, layer in layers.items()}


def schemes_of(weights: Mapping[str, CompressedTensor], schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The scheme of each stored weight, by layer; its format alone where `schemes` does not name the layer.

    Raises TurbopocketError when a scheme is of another format than the weight.
    """
    found = {name: schemes.get(name) or Scheme(weight.format) for name, weight in weights.items()}
    for name, weight in weights.items():
        if found[name].weight != weight.format:
            raise TurbopocketError(f"{name}: its weight is stored in {weight.format}, planned is {found[name]}")
    return found


def with_references(
    component: Component, forms: Mapping[str, LayerForm], weights: Mapping[str, CompressedTensor]
) -> Component:
    """The component with the reference of each form (by full name) in its layer's place.

    It shares all tensors but the layers' weights.
    """
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*component.module.parameters(), *component.module.buffers())
    }
    module = copy.deepcopy(component.module, shared)
    model: nn.Module = module.model
    for name, form in forms.items():
        layer = form.reference(model.get_submodule(form.layer.path), weights[name])
        model.set_submodule(form.layer.path, layer)
    return replace(component, module=module)


def require_equal_shares(weights: Mapping[str, CompressedTensor]) -> None:
    """Returns when what all layers of a format have in common is equal in all of them, else names the first other."""
    first: dict[tuple[LayerFormat, str], Tensor] = {}
    for name, weight in weights.items():
        for part in weight.format.shared_parts:
            value = weight.parts[part]
            if not torch.equal(first.setdefault((weight.format, part), value), value):
                raise TurbopocketError(f"{name}: its {part} of {weight.format} are not those of other layers")


def require_own_weights(component: Component) -> None:
    """Returns when no layer's weight is another parameter of the component as well; TurbopocketError names both.

    Such a weight would be counted and compressed twice, or be missed where it is read as it is.
    """
    layers = {
        f"{component.layer_prefix}{path}.weight"
        for path, module in component.module.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    owner: dict[int, str] = {}
    for name, parameter in component.module.named_parameters(remove_duplicate=False):
        first = owner.setdefault(id(parameter), name)
        if first != name and layers & {first, name}:
            raise TurbopocketError(
                f"{first} and {name} are one parameter: layers with shared weights are not supported"
            )


def _and_others(count: int) -> str:
    return {0: "", 1: " and 1 other layer"}.get(count, f" and {count} other layers")
