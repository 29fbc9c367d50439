# SPDX-License-Identifier: Apache-2.0
"""A plan carried out: every planned layer in its format, as a file, and back in the PyTorch model."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ground.errors import TurbopocketError, of_layer
from ..ground.files import write_whole
from .fit import Fit
from .formats import CompressedTensor, parse_format
from .layers import compressible_layers, weight_of
from .observe import LayerStats, SecondMoment
from .plan import Choice, Plan
from .scheme import parse_scheme
from .workers import Spread, in_turn


def compress(
    layers: Mapping[str, nn.Module],
    plan: Plan,
    fit: Fit,
    stats: Mapping[str, LayerStats] | None = None,
    spread: Spread = in_turn,
) -> dict[str, CompressedTensor]:
    """Every layer stored in the weight format the plan chose, in the plan's order; same input, same bytes.

    TurbopocketError naming the layer when plan and model list different layers, shapes or sizes, when a weight is
    NaN or infinite, or when the fit needs statistics that are not there.
    """
    planned = {choice.layer for choice in plan.choices}
    _require_same_layers(planned, set(layers))
    stored = spread(_stored, (_job(layers, choice, fit, stats or {}) for choice in plan.choices))
    return {choice.layer: each for choice, each in zip(plan.choices, stored, strict=True)}


@dataclass(frozen=True)
class _Job:
    choice: Choice
    weight: Tensor
    fit: Fit
    hessian_KK: Tensor | None


def _job(layers: Mapping[str, nn.Module], choice: Choice, fit: Fit, stats: Mapping[str, LayerStats]) -> _Job:
    weight = weight_of(choice.layer, layers[choice.layer]).detach()
    if tuple(weight.shape) != choice.shape:
        found, planned = list(weight.shape), list(choice.shape)
        raise TurbopocketError(f"{choice.layer}: weight of shape {found}, planned for shape {planned}")
    return _Job(choice, weight, fit, stats[choice.layer][SecondMoment].hessian_KK if choice.layer in stats else None)


def _stored(job: _Job) -> CompressedTensor:
    choice = job.choice
    with of_layer(choice.layer):
        stored = parse_scheme(choice.scheme).weight.compress(job.weight, job.fit, job.hessian_KK)
    if stored.nbytes != choice.nbytes:
        raise TurbopocketError(
            f"{choice.layer}: {stored.nbytes:,} bytes in {choice.scheme}, the plan counts {choice.nbytes:,}"
        )
    return stored


def _require_same_layers(planned: set[str], found: set[str]) -> None:
    for names, where in (
        (planned - found, "in the plan, not in the model"),
        (found - planned, "not in the plan"),
    ):
        if names:
            raise TurbopocketError(f"{len(names)} layers are {where}, the first is {min(names)}")


@contextmanager
def decompressed(
    module_by_component: Mapping[str, nn.Module], weights: Mapping[str, CompressedTensor]
) -> Iterator[None]:
    """While the block runs, the model has the stored weights; afterwards its own, also after an error.

    Names are those of layers, and of parameters for the norms and biases that fine-tuning changed. TurbopocketError
    naming a stored layer that the model lacks or has in another shape.
    """
    found = {
        name: parameter
        for component, module in module_by_component.items()
        for name, parameter in _storable(component, module)
    }
    missing = set(weights) - set(found)
    if missing:
        raise TurbopocketError(f"{len(missing)} stored layers are not in the model, the first is {min(missing)}")
    with ExitStack() as originals:
        for name, stored in weights.items():
            weight = found[name]
            if tuple(weight.shape) != stored.shape:
                raise TurbopocketError(f"{name}: stored shape {list(stored.shape)}, the model has {list(weight.shape)}")
            originals.callback(_assign, weight, weight.detach().clone())
            _assign(weight, stored.format.decompress(stored))
        yield


def _storable(component: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by the name of their layer, and one-dimensional parameters (norms and biases) by their own."""
    for name, layer in compressible_layers(component, module).items():
        yield name, weight_of(name, layer)
    for path, parameter in module.named_parameters():
        if parameter.ndim == 1:
            yield f"{component}.{path}", parameter


def _assign(weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(values)


def save_weights(path: Path, weights: Mapping[str, CompressedTensor]) -> None:
    """Writes the parts as safetensors tensors `<layer>.<part>`, formats and shapes in the metadata."""
    layers = {name: {"format": str(stored.format), "shape": stored.shape} for name, stored in weights.items()}
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, stored in weights.items()
        for part, tensor in stored.parts.items()
    }
    with write_whole(path) as partial:
        # One metadata entry: safetensors writes several in no fixed order, and the bytes must not vary.
        save_file(tensors, partial, metadata={"compressed": json.dumps(layers)})


def load_weights(path: Path) -> dict[str, CompressedTensor]:
    """The weights saved at `path`; TurbopocketError naming the file, and the layer whose parts are wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            layers = json.loads((file.metadata() or {})["compressed"])
            return {name: _load_layer(file, name, **entry) for name, entry in layers.items()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, TurbopocketError) as error:
        raise TurbopocketError(f"{path}: not a file of compressed weights: {error}") from error


def _load_layer(file: safe_open, name: str, format: str, shape: list[int]) -> CompressedTensor:
    layer_format = parse_format(format)
    promised = layer_format.part_specs(tuple(shape))
    parts = {part: file.get_tensor(f"{name}.{part}") for part in promised}
    stored = CompressedTensor(layer_format, tuple(shape), parts)
    with of_layer(name):
        stored.require_promised_parts()
    return stored
