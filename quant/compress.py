# SPDX-License-Identifier: Apache-2.0
"""A plan carried out: every planned layer in its format, as a file, and back in the PyTorch model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError, of_layer
from .fit import Fit
from .formats import CompressedTensor
from .layers import CompressedSource, compressible_layers, weight_from, weight_of, weight_shape
from .observe import LayerStats, carried_for, hessian_for
from .plan import Choice, Plan
from .scheme import parse_scheme
from .store import WeightStore, save_weights
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
    return dict(_compressed(layers, plan, fit, stats or {}, spread))


def compress_to_files(
    layers: Mapping[str, nn.Module],
    plan: Plan,
    fit: Fit,
    stats: Mapping[str, LayerStats],
    folder: Path,
    spread: Spread = in_turn,
    advance: Callable[[], None] = lambda: None,
) -> WeightStore:
    """Like `compress`, with each layer written to `folder` as soon as it is made, and read when it is asked for.

    A layer that is there in the format of the plan is not made again, so that a later call with another plan makes what
    that changes. Everything else that the bytes depend on has to be the same in all calls of one folder. `advance` is
    called after each layer.
    """
    store = WeightStore(folder, {name: scheme.weight for name, scheme in plan.schemes.items()})
    _require_same_layers(set(store), set(layers))
    missing = [choice for choice in plan.choices if not store.file(choice.layer).is_file()]
    for _ in range(len(plan.choices) - len(missing)):
        advance()
    wanted = {choice.layer: layers[choice.layer] for choice in missing}
    folder.mkdir(parents=True, exist_ok=True)
    for name, stored in _compressed(wanted, replace(plan, choices=tuple(missing)), fit, stats, spread):
        save_weights(store.file(name), {name: stored})
        advance()
    return store


def _compressed(
    layers: Mapping[str, nn.Module], plan: Plan, fit: Fit, stats: Mapping[str, LayerStats], spread: Spread
) -> Iterator[tuple[str, CompressedTensor]]:
    _require_same_layers({choice.layer for choice in plan.choices}, set(layers))
    stored = spread(_stored, (_job(layers, choice, fit, stats) for choice in plan.choices))
    for choice, each in zip(plan.choices, stored, strict=True):
        yield choice.layer, each


@dataclass(frozen=True)
class _Job:
    choice: Choice
    weight: Tensor
    fit: Fit
    stats: LayerStats | None

    def carried(self) -> "_Job":
        """The job with its statistics, for where their files are not."""
        return self if self.stats is None else replace(self, stats=carried_for(self.fit, self.stats))


def _job(layers: Mapping[str, nn.Module], choice: Choice, fit: Fit, stats: Mapping[str, LayerStats]) -> _Job:
    weight = weight_of(choice.layer, layers[choice.layer]).detach()
    if tuple(weight.shape) != choice.shape:
        found, planned = list(weight.shape), list(choice.shape)
        raise TurbopocketError(f"{choice.layer}: weight of shape {found}, planned for shape {planned}")
    return _Job(choice, weight, fit, stats.get(choice.layer))


def _stored(job: _Job) -> CompressedTensor:
    choice = job.choice
    with of_layer(choice.layer):
        hessian = None if job.stats is None else hessian_for(job.fit, job.stats)
        stored = parse_scheme(choice.scheme).weight.compress(job.weight, job.fit, hessian)
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

    A layer decompresses its weight when it runs. Names are those of layers, and of parameters for the norms and biases
    that fine-tuning changed. TurbopocketError naming a stored layer that the model lacks or has in another shape.
    """
    layers, vectors = _storable(module_by_component)
    missing = set(weights) - layers.keys() - vectors.keys()
    if missing:
        raise TurbopocketError(f"{len(missing)} stored layers are not in the model, the first is {min(missing)}")
    with ExitStack() as originals:
        for name, stored in weights.items():
            shape = weight_shape(name, layers[name]) if name in layers else tuple(vectors[name].shape)
            if shape != stored.shape:
                raise TurbopocketError(f"{name}: stored shape {list(stored.shape)}, the model has {list(shape)}")
            if name in layers:
                originals.enter_context(weight_from(layers[name], CompressedSource(stored)))
            else:
                originals.callback(_assign, vectors[name], vectors[name].detach().clone())
                _assign(vectors[name], stored.format.decompress(stored))
        yield


def _storable(module_by_component: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Layers, and one-dimensional parameters (norms and biases), by name."""
    layers: dict[str, nn.Module] = {}
    vectors: dict[str, Tensor] = {}
    for component, module in module_by_component.items():
        layers |= compressible_layers(component, module)
        for path, parameter in module.named_parameters():
            if parameter.ndim == 1:
                vectors[f"{component}.{path}"] = parameter
    return layers, vectors


def _assign(vector: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        vector.copy_(values)
