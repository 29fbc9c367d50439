# SPDX-License-Identifier: Apache-2.0
"""Which operations of a program stay in fp32, where fp16 would lose the result; all others compute in fp16.

Sines and cosines of time steps and picture sizes: their argument reaches 999 and more, where neighbouring fp16 numbers
are half a radian apart. Everything that leads to them, the table of frequencies included, stays in fp32 too.

Layers whose output calibration saw near fp16's end: they stay in fp32 with everything that still has their magnitude,
up to and with the next operation whose result is bounded by what it computes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ....ground.errors import TurbopocketError
from ....runtimes.coreml.file.dtypes import LARGEST_FP16
from ..layer import Layer
from .interface import PackageDtype
from .trace import LAYER

HEADROOM = 4.0
"""Magnitudes above the largest fp16 number over this count as too large: the next prompt may need more, and so may
the partial sums of a product."""

_PERIODIC = ("sin", "cos")
_BOUNDED = ("layer_norm", "softmax", "sigmoid", "tanh")
"""Operations whose result does not have their input's magnitude. A division by a computed value is the GroupNorm's."""


def too_large(magnitude: float) -> bool:
    """Whether fp16 can not be trusted with numbers of that magnitude."""
    return not magnitude <= LARGEST_FP16 / HEADROOM


class Fp32Region:
    """Answers coremltools, for each operation, whether it may be computed in fp16.

    `largest` is by full layer name, `outputs` has the types of the package's outputs in order.
    """

    def __init__(self, component: str, outputs: Mapping[str, PackageDtype], largest: Mapping[str, float]) -> None:
        self.component = component
        self.outputs = outputs
        self.paths = {
            name.removeprefix(f"{component}."): value
            for name, value in largest.items()
            if name.startswith(f"{component}.")
        }
        self.too_large = {path for path, value in self.paths.items() if too_large(value)}
        self._kept: set[str] | None = None
        self._large_outputs: dict[str, str] = {}

    def allows_fp16(self, op: Any) -> bool:
        """False for operations that stay in fp32. The first question must come before any operation is changed."""
        if self._kept is None:
            self._kept = self._decide(op.enclosing_block)
        return op.name not in self._kept

    def require_sound(self, layers: Sequence[Layer]) -> None:
        """Returns when all layers of this component in `largest` run, and no fp16 output has their magnitude."""
        unknown = sorted(self.paths.keys() - {layer.path for layer in layers})
        if unknown:
            raise TurbopocketError(f"{self.component} runs no layer {unknown[0]}, whose largest output was given")
        for output, path in self._large_outputs.items():
            raise TurbopocketError(
                f"{self.component}.{path} reaches {self.paths[path]:.6g}, and output {output} is fp16, "
                f"which ends at {LARGEST_FP16:.0f} (with a margin of {HEADROOM:g})"
            )

    def _decide(self, block: Any) -> set[str]:
        kept: set[str] = set()
        for op in block.operations:
            if op.op_type in _PERIODIC:
                _add_with_ancestors(op, kept)
        large: dict[Any, str] = {}
        for op in block.operations:
            source = next((large[value] for value in _inputs(op) if value in large), None)
            path = op.path.val if op.op_type == LAYER else None
            if path in self.too_large:
                source = path
            if source is None:
                continue
            kept.add(op.name)
            if path in self.too_large or not _is_bounded(op):
                large.update(dict.fromkeys(op.outputs, source))
        for (name, dtype), value in zip(self.outputs.items(), block.outputs, strict=True):
            if value in large and dtype == "float16":
                self._large_outputs[name] = large[value]
        return kept


def _is_bounded(op: Any) -> bool:
    if op.op_type == LAYER or op.op_type in _BOUNDED:
        return True
    return op.op_type == "real_div" and op.y.val is None


def _inputs(op: Any) -> Iterable[Any]:
    for value in op.inputs.values():
        yield from value if isinstance(value, list | tuple) else (value,)


def _add_with_ancestors(op: Any, found: set[str]) -> None:
    pending = [op]
    while pending:
        current = pending.pop()
        if current.name in found:
            continue
        found.add(current.name)
        pending += [value.op for value in _inputs(current) if value.op is not None and value.op.op_type != "const"]
