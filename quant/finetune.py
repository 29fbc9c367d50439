# SPDX-License-Identifier: Apache-2.0
"""Codes stay; codebooks, scales, norms and biases are trained to give the float model's outputs again.

Egiazarian et al., VQDM (2024), section 3.3: after all layers are quantized the student matches its teacher on the
teacher's own trajectories. Here that is each component by itself, on calls recorded while the float model drew at the
shipped steps, so text encoders and the VAE's decoder are tuned like the UNet. N calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ground.errors import TurbopocketError
from .fit.grids import FP16_DIGITS
from .formats import Affine, CompressedTensor, Dense
from .formats.base import LayerFormat
from .options import FineTuneOptions

HELD_OUT = 8
"""One call in so many is not trained on: tuning that does not help there is not kept."""


@dataclass(frozen=True)
class Calls:
    """What went into a component and what the float model made of it: tensors [N, …]."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, calls: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> "Calls":
        """From (inputs, outputs) call by call, batches [B, …] each; a number [] holds for the whole batch."""

        def joined(columns: Iterator[tuple[Tensor, ...]], sizes: list[int]) -> tuple[Tensor, ...]:
            return tuple(
                torch.cat([each if each.ndim else each.expand(size) for each, size in zip(column, sizes, strict=True)])
                for column in columns
            )

        sizes = [len(outputs[0]) for _, outputs in calls]
        inputs = zip(*(inputs for inputs, _ in calls), strict=True)
        outputs = zip(*(outputs for _, outputs in calls), strict=True)
        return cls(joined(inputs, sizes), joined(outputs, sizes))

    def __len__(self) -> int:
        return len(self.outputs[0])

    def some(self, indices: Tensor) -> "Calls":
        """Those calls, in that order."""
        return Calls(tuple(each[indices] for each in self.inputs), tuple(each[indices] for each in self.outputs))


@dataclass(frozen=True)
class FineTuned:
    """Outcome for one component: `weights` by layer, and norms and biases by their own names, as `decompressed` has it.

    `before` and `after` are the losses on held-out calls, Σ (y - ŷ)² / Σ y² averaged over the outputs; when the second
    is not lower, `weights` are those that were given.
    """

    weights: dict[str, CompressedTensor]
    before: float
    after: float


def fine_tune(
    module: nn.Module,
    weights: Mapping[str, CompressedTensor],
    calls: Calls,
    options: FineTuneOptions,
    seed: int = 0,
    group_scale_digits: int = FP16_DIGITS,
    advance: Callable[[], None] = lambda: None,
) -> FineTuned:
    """Trains what belongs to `module`, whose parameters are called `<layer>.weight` for the layers in `weights`.

    Scales that a group of weights shares get `group_scale_digits` significant bits, as many as the runtime keeps. The
    module keeps its own parameters. Same arguments, same result. `advance` is called after each iteration.
    TurbopocketError for fewer calls than two, or when the loss is no longer finite.
    """
    if len(calls) < 2:
        raise TurbopocketError(f"fine-tuning needs 2 calls or more, one of them held out, not {len(calls)}")
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed))
    held_out = calls.some(order[: max(1, len(calls) // HELD_OUT)])
    shown = calls.some(order[len(held_out) :])
    energies = [max(float(each.double().square().mean()), 1e-30) for each in calls.outputs]
    student = _Student(module, weights)

    def loss(batch: Calls) -> Tensor:
        found = student(batch.inputs)
        terms = [(a - b).square().mean() / e for a, b, e in zip(found, batch.outputs, energies, strict=True)]
        return torch.stack(terms).mean()

    def held_out_loss() -> float:
        parts = torch.arange(len(held_out)).split(options.batch)
        with torch.no_grad():
            return sum(float(loss(held_out.some(part))) * len(part) for part in parts) / len(held_out)

    before = held_out_loss()
    optimizer = torch.optim.Adam(student.trained, lr=options.learning_rate, betas=(0.9, 0.98))
    batches = _batches(len(shown), options.batch, seed)
    for iteration in range(options.iterations):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - iteration / options.iterations)
        step_loss = loss(shown.some(next(batches)))
        if not torch.isfinite(step_loss):
            raise TurbopocketError(
                f"fine-tuning: the loss is {float(step_loss.detach())} in iteration {iteration + 1}",
                hint=f"a lower learning rate than {options.learning_rate:g} may help",
            )
        optimizer.zero_grad()
        step_loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance()
    tuned = student.stored(group_scale_digits)
    student = _Student(module, tuned)
    after = held_out_loss()
    return FineTuned(tuned, before, after) if after < before else FineTuned(dict(weights), before, after)


def stand_ins(modules: Mapping[str, nn.Module]) -> dict[str, CompressedTensor]:
    """For norms and biases of components, values of which no two are equal, by parameter name."""
    random = torch.Generator().manual_seed(0)
    return {
        f"{component}.{path}": held_vector(torch.rand(parameter.shape, generator=random) + 0.5)
        for component, module in modules.items()
        for path, parameter in module.named_parameters()
        if parameter.ndim == 1
    }


def held_vector(value: Tensor) -> CompressedTensor:
    """A norm or a bias [N] as it is stored, float32."""
    return CompressedTensor(Dense(32), tuple(value.shape), {"weight": value})


def _batches(calls: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of so many calls, each call once before any comes again."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(calls, generator=random).split(min(batch, calls))


@dataclass
class Trained:
    """A tensor as its root mean square times a parameter, which is what Adam moves."""

    value: Tensor
    unit: Tensor = field(init=False)
    parameter: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        value = self.value.detach().float()
        rms = value.square().mean().sqrt()
        self.unit = torch.where(rms > 0, rms, 1.0)
        self.parameter = nn.Parameter(value / self.unit)

    def __call__(self) -> Tensor:
        return self.parameter * self.unit


class _Student:
    """The module with stored weights, as a function of what is trained in them."""

    def __init__(self, module: nn.Module, weights: Mapping[str, CompressedTensor]) -> None:
        own = dict(module.named_parameters())
        self.module = module
        self.layers = {name: stored for name, stored in weights.items() if f"{name}.weight" in own}
        shared: dict[tuple[LayerFormat, str], Trained] = {}
        self.parts: dict[str, dict[str, Trained]] = {}
        for name, stored in self.layers.items():
            if isinstance(stored.format, Dense):
                continue
            self.parts[name] = {
                part: Trained(value) for part, value in stored.parts.items() if value.is_floating_point()
            }
            for part in stored.format.shared_parts:  # one for all, so that they stay equal
                self.parts[name][part] = shared.setdefault((stored.format, part), self.parts[name][part])
        held = {name: stored.format.decompress(stored) for name, stored in weights.items() if name in own}
        self.vectors = {
            name: Trained(held.get(name, parameter))
            for name, parameter in own.items()
            if parameter.ndim == 1 and name.removesuffix(".weight") not in self.layers
        }
        self.dense = {
            f"{name}.weight": stored.format.decompress(stored)
            for name, stored in self.layers.items()
            if isinstance(stored.format, Dense)
        }

    @property
    def trained(self) -> list[nn.Parameter]:
        parts = {id(each): each.parameter for parts in self.parts.values() for each in parts.values()}
        return [*parts.values(), *(each.parameter for each in self.vectors.values())]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = {f"{name}.weight": self._decoded(name) for name in self.parts} | self.dense
        values |= {name: each() for name, each in self.vectors.items()}
        found = functional_call(self.module, values, tuple(inputs))
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def stored(self, group_scale_digits: int) -> dict[str, CompressedTensor]:
        """Everything in its stored type again; layers in the order in which they were given."""
        stored = {name: self._stored(name, group_scale_digits) for name in self.layers}
        for name, each in self.vectors.items():
            stored[name] = held_vector(each().detach().clone())
        return stored

    def _decoded(self, name: str) -> Tensor:
        stored = self.layers[name]
        trained = {part: each() for part, each in self.parts[name].items()}
        return stored.format.decode(CompressedTensor(stored.format, stored.shape, stored.parts | trained))

    def _stored(self, name: str, group_scale_digits: int) -> CompressedTensor:
        stored = self.layers[name]
        parts = dict(stored.parts)
        for part, each in self.parts.get(name, {}).items():
            digits = group_scale_digits if _has_groups(stored.format) else FP16_DIGITS
            value = rounded_to_digits(each().detach(), digits).to(torch.float16)
            # Where training left the range of fp16, the value stays what it was.
            parts[part] = torch.where(torch.isfinite(value), value, stored.parts[part])
        return CompressedTensor(stored.format, stored.shape, parts)


def _has_groups(format: LayerFormat) -> bool:
    return isinstance(format, Affine) and format.group is not None


def rounded_to_digits(values: Tensor, digits: int) -> Tensor:
    """The nearest float32 numbers of so many significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2**digits), exponent - digits)
